"""Compiles the Triton kernels ahead of time, for GPUs that need not be here, and prints what ptxas made of them.

python compiled_kernels.py [BITS-DTYPE-SCALES-KERNEL-ARCHITECTURE-CHANNELS …]      e.g. 4-bf16-bf16-quantize-90-4096

One JSON object: variant → registers, bytes of local memory (stack and spills), SASS instructions and those that access
memory. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from qatscale.quant import triton_kernels
from qatscale.quant.bit_widths import BY_TEXT

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KERNELS = {
    "quantize": (triton_kernels._quantize, triton_kernels.FORWARD),
    "gradients": (triton_kernels._gradients, triton_kernels.BACKWARD),
}
OF_SCALES, SIZES = ("scale_pointer", "grad_scale_pointer"), ("rows", "channels")


def compiled(variant: str) -> dict[str, Any]:
    """As the launcher would compile it for contiguous tensors whose rows and channels are multiples of 16."""
    bits, dtype, scales, kernel, architecture, channels = variant.split("-")
    function, tile = KERNELS[kernel]
    constants = triton_kernels._constants(BY_TEXT[bits], *tile.of(int(channels)), tile)
    options = {key: constants.pop(key) for key in ("num_warps", "enable_fp_fusion")}

    def type_of(name: str) -> str:
        if name.endswith("_pointer"):
            return f"*{scales if name in OF_SCALES else dtype}"
        return "constexpr" if name in constants else "i32" if name in SIZES else "fp32"

    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_pointer") or n in SIZES}
    source = ASTSource(function, {name: type_of(name) for name in names}, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", int(architecture), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", listing, re.M)
    memory = [i for i in instructions if re.match(r"(LD|ST|LDG|STG|LDL|STL|ATOM|ATOMG|RED|REDG)(\.|$)", i)]
    return {
        "registers": int(found["REG"]),
        "local": int(found["STACK"]) + int(found["LOCAL"]),
        "instructions": len([i for i in instructions if i != "NOP"]),
        "memory": sorted(memory),
    }


if __name__ == "__main__":
    print(json.dumps({variant: compiled(variant) for variant in sys.argv[1:]}))
