"""The names under which a finished run keeps its validation losses. qatscale writes them, qatlaw reads them."""

VAL_LOSS = "final/val_loss"
"""Loss of the weights as they are used: in full precision for scheme fp, quantized otherwise."""
VAL_LOSS_FP = "final/val_loss_fp_view"
"""Loss in full precision."""
VAL_LOSS_PTQ = "final/val_loss_ptq"
"""Loss after post-training quantization; the bit width follows."""
