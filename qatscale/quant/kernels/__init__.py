"""The quantizers' forward and backward pass over a weight, in two implementations of the same two functions.

    quantize(quantizer, w, alpha) -> ŵ                                      w: [..., in], α: [...] or [..., groups]
    gradients(quantizer, grad, w, alpha, grad_factor) -> (dL/dw, dL/dα)     grad: dL/dŵ

`reference` is plain tensor arithmetic, on any device and in fp32 or float64. `triton` has one kernel for each pass, on
CUDA. Both give the same values of ŵ to the bit and the same dL/dw; dL/dα, a sum, to rounding. `dispatch` chooses.
"""
