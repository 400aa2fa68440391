"""An optimizer step of one process, replayed on paper: what forward keeps for backward, and what else is there then.

The order of things is that of `qatscale.model.llama` and `qatscale.model.loss`; the sizes are of what autograd keeps:
inputs of products, of the norms and of SiLU, the tensors of the attention kernel. Megatron's count (arXiv 2205.05198,
section 4) is of another model (GeLU, dropout, unfused softmax), its way of counting is this one.

Per token of a block, with width D, key-value width K, inner width I and bytes w of an element, all but the stream and
the norms divided by the tensor-parallel processes:

    2·D·w the stream before each norm      2·(D·w + 4) what the norms return, and 1/rms     4·heads log Σ exp
    (2·D + 2·K)·w q, k, v, attended        4·I·w gate, SiLU(gate), up, their product

With sequence parallelism the stream and 1/rms are divided too; what the norms return is kept gathered, so it is not.
With activation checkpointing a block keeps its input, D·w, and makes the rest again before its backward. In QAT each
product keeps a dense quantized weight from forward to backward (`F.linear` saves it).

Kernels are those of CUDA: fused RMSNorm, flash or memory-efficient attention. On CPU, where the test measures, a norm
keeps its normalised input in fp32 as well, and casts that CUDA does on the fly are copies. Not counted: workspaces of
kernels, the allocator's rounding and gaps, and the t x t scores of unfused attention, which CUDA falls back on in fp32
with grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatscale.config.schema import RunConfig
from qatscale.engine.dry_run.ledger import Ledger
from qatscale.engine.dry_run.share import Matrix, Share
from qatscale.engine.dry_run.zero_memory import zero_of
from qatscale.engine.dry_run.zero_plan import FP32, ZeroPlan
from qatscale.engine.layout import Layout
from qatscale.model.chunks import chunk_rows

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Micro:
    """Sizes of a micro-batch on one process: bytes of its tensors."""

    tokens: int
    stream: int
    """Tokens of the residual stream: a share of them under sequence parallelism."""
    width: int
    weight: int
    """Bytes of an element."""
    device: Device
    tensor: int
    sequence: bool

    def of(self, channels: int) -> int:
        """[tokens, channels] in the weights' precision."""
        return self.tokens * channels * self.weight

    @property
    def residual(self) -> int:
        """[stream tokens, width]."""
        return self.stream * self.width * self.weight

    @property
    def normed(self) -> int:
        """What a norm keeps but its input: 1/rms, and its output as the products take it."""
        kept = FP32 * self.stream + self.of(self.width)
        if self.device == "cpu":  # the normalised input, and the input itself in fp32 instead of what it came in
            kept += self.stream * self.width * (FP32 + FP32 - self.weight)
        return kept


def start_bytes(share: Share, plan: ZeroPlan) -> int:
    """Before the first step: the share comes to the device whole and in fp32, and only then ZeRO divides it. In fp32
    ZeRO-1 and 2 flatten a copy of a group; a cast to bf16 goes parameter by parameter."""
    copied = max(map(sum, share.groups.values())) if plan.weight == FP32 and plan.stage < 3 else 0
    return FP32 * (share.weights + share.scales + copied)


class Step:
    """A process's step on `micro_batches`, in one phase. Call `replay` once; the rest is its parts in order."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        share: Share,
        plan: ZeroPlan,
        *,
        quantized: bool,
        device: Device = "cuda",
    ) -> None:
        self.share, self.layout, self.quantized = share, layout, quantized
        self.recompute = config.engine.activation_checkpointing
        tokens = config.batch.micro_batch * config.data.sequence_length
        stream = tokens // layout.tensor if config.engine.sequence_parallel else tokens
        self.micro = Micro(
            tokens, stream, share.width, plan.weight, device, layout.tensor, config.engine.sequence_parallel
        )
        self.micro_batches = config.batch.sequences // (config.batch.micro_batch * layout.data)
        self.heads = config.model.heads // layout.tensor
        self.ledger = Ledger()
        self.zero = zero_of(self.ledger, share, plan, recompute=self.recompute, pipelined=layout.pipeline > 1)
        self.attention, self.mlp = share.block[:4], share.block[4:]
        self.attended, self.keys, self.inner = share.block[0].rows, share.block[1].rows, share.block[4].rows

    def replay(self) -> Ledger:
        """The micro-batches in the order of the pipeline (one forward, one backward), then the optimizer."""
        self.zero.resident()
        self._pipeline_buffers()
        ahead = min(self.layout.pipeline - self.share.stage.index, self.micro_batches)
        # what repeats itself adds nothing: a second micro-batch finds the first one's gradients, then all are alike
        shown = min(self.micro_batches, ahead + 2)
        for index in range(shown + ahead - 1):
            if index < shown:
                self._forward()
            if index >= ahead - 1:
                self._backward(last=index == shown + ahead - 2)
        self.ledger.moment = "optimizer step"
        self.zero.step()
        return self.ledger

    def _pipeline_buffers(self) -> None:
        """What PipelineEngine keeps between steps: a buffer to receive into from either side."""
        if self.layout.pipeline == 1:
            return
        stage = self.share.stage
        self.ledger.hold("buffers", self.micro.residual * ((not stage.is_first) + (not stage.is_last)))

    # --- forward ---

    def _forward(self) -> None:
        self.ledger.moment = "forward"
        if self.share.embed:
            self._embed()
        else:  # received, kept to send its gradient back, and copied for the forward pass
            self.ledger.hold("activations", 2 * self.micro.residual)
        for block in range(self.share.blocks):
            if self.recompute:
                self._block_without_keeping(block)
            else:
                self._block(block)
            self.ledger.hold("activations", self.micro.residual)
        if self.share.head:
            self._head(self.share.head)

    def _embed(self) -> None:
        assert self.share.embed
        self.zero.fetch(0)
        self.ledger.hold("activations", self.micro.residual)
        if self.micro.tensor > 1:  # masked rows, and the sum over the processes
            self.ledger.touch("activations", 2 * self.micro.of(self.share.width))
        if self._is_quantized(self.share.embed):
            self.ledger.hold("quantized", self.micro.of(self.share.width))
        self.zero.release(0)

    def _block(self, block: int, *, again: bool = False) -> None:
        """All that it keeps but its input and its output. `again`: in backward, which has asked for `down` already."""
        micro, hold = self.micro, self.ledger.hold
        hold("activations", micro.normed)
        for offset, matrix in enumerate(self.attention):
            self._use(self._index(block, offset), matrix)
        hold("activations", self._attended_bytes)
        hold("activations", micro.residual)
        hold("activations", micro.normed)
        for offset, matrix in enumerate(self.mlp, start=len(self.attention)):
            self._use(self._index(block, offset), matrix, release=not (again and matrix is self.mlp[-1]))
        hold("activations", 4 * micro.of(self.inner))

    def _block_without_keeping(self, block: int) -> None:
        """One matrix after the other; at most the MLP's three inner tensors and what it takes and returns."""
        for offset, matrix in enumerate(self.share.block):
            self._use(self._index(block, offset), matrix, keep=False)
        self.ledger.touch("activations", self.micro.normed + 3 * self.micro.of(self.inner) + 2 * self.micro.residual)

    @property
    def _attended_bytes(self) -> int:
        """q, k, v, what attention returns (o's input), log Σ exp."""
        return self.micro.of(2 * self.attended + 2 * self.keys) + FP32 * self.micro.tokens * self.heads

    def _use(self, index: int, matrix: Matrix, *, keep: bool = True, release: bool = True) -> None:
        """A product's forward: its weight is gathered, quantized, and kept quantized."""
        self.zero.fetch(index)
        copy = self._copy(matrix)
        self.ledger.hold("quantized", copy)
        if copy:
            self.ledger.touch("quantized", self._workspace(matrix.numel, passes=1))
        if not keep:
            self.ledger.drop("quantized", copy)
        if release:
            self.zero.release(index)

    def _head(self, head: Matrix) -> None:
        """Chunks of logits; at the end the gradient of what the head took has its place, and the weight's is there."""
        micro, ledger = self.micro, self.ledger
        ledger.hold("activations", micro.normed)
        self._use(self._head_index, head, release=False)
        ledger.moment = "loss"
        ledger.hold("gradients", head.numel * self._head_gradient)
        elements = self._chunk * head.rows
        with ledger.meanwhile("activations", elements * micro.weight + micro.of(self.share.width)):
            if micro.weight != FP32:
                cast = FP32 if micro.device == "cpu" and micro.tensor == 1 else 0
                ledger.touch("activations", elements * (FP32 + max(cast, micro.weight)))
                if self._chunk < micro.tokens:  # a chunk's product, before it is added
                    ledger.touch("gradients", elements * micro.weight + head.numel * micro.weight)
        ledger.drop("quantized", self._copy(head))
        self.zero.release(self._head_index)

    @property
    def _chunk(self) -> int:
        """Tokens of the loss's chunks."""
        assert self.share.head
        return chunk_rows(self.micro.tokens, self.share.head.rows, self.micro.device)

    @property
    def _head_gradient(self) -> int:
        """Bytes of an element of the head's gradient while it waits for backward: chunks are added in fp32."""
        return FP32 if self._chunk < self.micro.tokens else self.micro.weight

    # --- backward ---

    def _backward(self, *, last: bool) -> None:
        ledger, micro = self.ledger, self.micro
        ledger.moment = "backward"
        ledger.hold("activations", micro.residual)  # the stream's gradient
        if self.share.head:
            self._head_backward(self.share.head)
        else:
            ledger.drop("activations", micro.residual)  # the output that was sent on
        for block in reversed(range(self.share.blocks)):
            self.zero.fetch(self._index(block, len(self.share.block) - 1))
            if self.recompute:
                self._block(block, again=True)
            self._block_backward(block)
        ledger.drop("activations", micro.residual)
        if self.share.embed:
            self._embed_backward(self.share.embed)
        else:
            ledger.drop("activations", micro.residual)
        ledger.moment = "reduction of gradients"
        self.zero.backward_done(last)

    def _head_backward(self, head: Matrix) -> None:
        ledger, size = self.ledger, head.numel * self.micro.weight
        if self._head_gradient != self.micro.weight:
            ledger.touch("gradients", size)
        ledger.drop("gradients", head.numel * self._head_gradient)
        ledger.hold("quantized", self._copy(head))  # `_gradient` lets it go; this one has gone already
        self._gradient(self._head_index, head, 0, arrives=not self.share.tied_here)
        self._norm_backward()

    def _block_backward(self, block: int) -> None:
        """The MLP, then attention. The stream's gradient is held by whoever calls."""
        micro, hold, drop = self.micro, self.ledger.hold, self.ledger.drop
        one, wide = micro.of(self.inner), micro.of(self.share.width)
        gathered = wide if micro.sequence else 0
        gate, up, down = (self._index(block, offset) for offset in (4, 5, 6))
        hold("activations", gathered)
        hold("activations", one)  # of the product, whose value is not needed any more
        self._gradient(down, self.mlp[2], one + gathered, fetch=False)
        hold("activations", 2 * one)  # of SiLU(gate) and of up, which replace it and their values
        drop("activations", 3 * one)
        hold("activations", wide)
        self._gradient(up, self.mlp[1], one)
        hold("activations", one)  # of gate
        drop("activations", 2 * one)
        hold("activations", wide)
        self._gradient(gate, self.mlp[0], one)
        drop("activations", wide)
        self._norm_backward(wide)

        q, k, v, o = (self._index(block, offset) for offset in range(4))
        hold("activations", gathered)
        hold("activations", micro.of(self.attended))
        self._gradient(o, self.attention[3], gathered)
        hold("activations", micro.of(self.attended + 2 * self.keys))
        drop("activations", self._attended_bytes + micro.of(self.attended))
        with self.ledger.meanwhile("activations", wide):
            for index, matrix in ((v, self.attention[2]), (k, self.attention[1]), (q, self.attention[0])):
                self._gradient(index, matrix, micro.of(matrix.rows))
        self._norm_backward()

    def _norm_backward(self, incoming: int = 0) -> None:
        """What it kept, its input, and `incoming` bytes of gradient that become the stream's."""
        if self.micro.tensor > 1:
            self.ledger.touch("activations", self.micro.of(self.share.width))
        self.ledger.drop("activations", incoming + self.micro.normed + self.micro.residual)
        self.ledger.hold("gradients", self.share.width * self.micro.weight)
        self.zero.arrived("gradients", self.share.width)

    def _embed_backward(self, embed: Matrix) -> None:
        self.zero.fetch(0)
        size = embed.numel * self.micro.weight
        if self._is_quantized(embed):
            elements = self.micro.tokens * self.share.width
            self.ledger.touch("quantized", elements * self.micro.weight + self._workspace(elements, passes=3))
            self.ledger.drop("quantized", self.micro.of(self.share.width))
            if not self.share.tied_here:
                self._scales_arrive(embed)
        self.ledger.hold("gradients", size)  # dense: every row, looked up or not
        if self.share.tied_here:  # the head's has waited since; their sum is a third
            self.ledger.touch("gradients", size)
            self.ledger.drop("gradients", size)
            if self._is_quantized(embed):
                self._scales_arrive(embed)
        self.zero.arrived("gradients", embed.numel)
        self.zero.release(0)

    def _gradient(self, index: int, matrix: Matrix, consumed: int, *, arrives: bool = True, fetch: bool = True) -> None:
        """A weight's gradient, then through its quantizer in QAT. `consumed`: bytes of activations that it was made of.

        The quantizer's backward makes the weight's gradient anew.
        """
        micro, ledger = self.micro, self.ledger
        if fetch:
            self.zero.fetch(index)
        ledger.hold("gradients", matrix.numel * micro.weight)
        ledger.drop("activations", consumed)
        if self._is_quantized(matrix):
            ledger.drop("quantized", self._copy(matrix))
            ledger.touch("quantized", matrix.numel * micro.weight + self._workspace(matrix.numel, passes=3))
            if arrives:
                self._scales_arrive(matrix)
        if arrives:
            self.zero.arrived("gradients", matrix.numel)
        self.zero.release(index)

    def _scales_arrive(self, matrix: Matrix) -> None:
        self.ledger.hold("scales", matrix.scales * self.micro.weight)
        self.zero.arrived("scales", matrix.scales)

    # --- which matrix ---

    def _copy(self, matrix: Matrix) -> int:
        """Bytes of the quantized copy that a micro-batch makes of it."""
        return matrix.numel * self.micro.weight if self._is_quantized(matrix) else 0

    def _workspace(self, numel: int, passes: int) -> int:
        """What quantizing makes on the way to its result: nothing on GPUs; on CPU, operation by operation, `passes`
        fp32 tensors, of which in fp32 the last is the result.
        """
        if self.micro.device == "cuda":
            return 0
        return numel * FP32 * (passes - (self.micro.weight == FP32))

    def _is_quantized(self, matrix: Matrix) -> bool:
        return self.quantized and matrix.bits is not None

    def _index(self, block: int, offset: int) -> int:
        return (1 if self.share.embed else 0) + block * len(self.share.block) + offset

    @property
    def _head_index(self) -> int:
        return 0 if self.share.tied_here else self._index(self.share.blocks, 0)
