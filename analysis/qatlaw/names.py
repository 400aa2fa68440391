"""The names under which a finished run keeps its validation losses. qatscale writes them, qatlaw reads them."""

VAL_LOSS = "final/val_loss"
"""Of the weights as they would be used: in full precision for scheme fp, quantized otherwise."""
VAL_LOSS_FP = "final/val_loss_fp_view"
"""In full precision."""
VAL_LOSS_PTQ = "final/val_loss_ptq"
"""After post-training quantization; the bit width follows."""
