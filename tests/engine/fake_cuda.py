# mypy: ignore-errors
"""Training steps on a CUDA device that does not exist: torch's fake tensors, its fake process group, DeepSpeed itself.

python fake_cuda.py [key=value …]      with LD_PRELOAD of fake_cuda.cpp

Engine, two steps, the switch, two steps in QAT, a copy for a checkpoint, and three views, as process 1 of 4. Prints one
JSON object: where the host read a number of the device, by file, in each step, and what lies where.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import types
from collections import Counter

os.environ |= {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "DS_ACCELERATOR": "cuda"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

# --- torch.cuda as it is on a host of eight GPUs ---


class FakeStream:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, _: str) -> object:  # wait_stream, synchronize, record, query, elapsed_time …
        return lambda *_, **__: 1.0


class FakeContext(contextlib.nullcontext):  # of a stream or a device
    pass


def gives(value):
    return lambda *_, **__: value


cuda, GPU = torch.cuda, "NVIDIA H100 80GB HBM3"
cuda.Stream = cuda.Event = FakeStream
cuda.stream = cuda.device = cuda.device_of = FakeContext
for name, value in {
    "current_stream": FakeStream(), "default_stream": FakeStream(), "is_available": True, "device_count": 8,
    "current_device": 0, "_lazy_init": None, "synchronize": None, "set_device": None, "empty_cache": None,
    "reset_peak_memory_stats": None, "max_memory_allocated": 1 << 30, "memory_allocated": 1 << 30,
    "get_device_name": GPU, "get_device_capability": (9, 0),
    "get_device_properties": types.SimpleNamespace(
        total_memory=80 << 30, multi_processor_count=132, major=9, minor=0, name=GPU, warp_size=32, is_integrated=False
    ),
    "cudart": types.SimpleNamespace(cudaHostRegister=gives(0), cudaHostUnregister=gives(0)),
}.items():  # fmt: skip
    setattr(cuda, name, gives(value))
cuda.nvtx._nvtx = types.SimpleNamespace(rangePushA=gives(0), rangePop=gives(0))
torch.backends.cuda.is_built = gives(True)
compiled = torch.compile
torch.compile = lambda function=None, **options: compiled(function, **options | {"backend": "aot_eager"})

# --- what fake tensors do not do ---

fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # a tensor of one number is not computed beside, on a device that is not here
plain_numpy, plain_data, plain_enter = torch.Tensor.numpy, torch.Tensor.data, FakeTensorMode.__enter__
torch.Tensor.pin_memory, torch.Tensor.record_stream = (lambda x: x), (lambda *_: None)


def enter(mode):
    entered = plain_enter(mode)
    torch._C._set_only_lift_cpu_tensors(True)  # as it does by itself where CUDA is not available
    return entered


def swap_tensors(one, other):  # torch's refuses tensors with weak references, which the mode keeps
    of_device = other.fake_device
    one.__class__ = other.__class__
    one.__dict__.update(other.__dict__)
    torch._C._swap_tensor_impl(one, other)
    one.fake_device = torch.device("cuda", 0) if sys._getframe(1).f_code.co_name == "_materialise" else of_device


def set_data(x, value):
    with torch._C._AutoDispatchBelowAutograd(), torch.autograd._unsafe_preserve_version_counter(x):
        torch.ops.aten.set_.source_Tensor(x, value.detach())


numbers = np.random.default_rng(0)


def numpy(x):
    if not isinstance(x, FakeTensor):
        return plain_numpy(x)
    assert x.device.type == "cpu", "a tensor of the device has no NumPy array"
    return numbers.random(x.shape).astype(str(x.dtype).removeprefix("torch."))


def gather_objects(found, item, **_):
    found[:] = [item] * len(found)


FakeTensorMode.__enter__, torch.utils.swap_tensors, torch.Tensor.numpy = enter, swap_tensors, numpy
FakeTensor.data = property(plain_data.__get__, set_data)
dist.all_gather_object = gather_objects


class Reads(TorchDispatchMode):
    """Answers the host's reads, and counts them by the file that asks."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_local_scalar_dense" in name:
            files = [frame.filename.split("site-packages/")[-1] for frame in traceback.extract_stack()]
            asks = next(file for file in reversed(files) if "torch/" not in file and file != __file__)
            self.places[asks.split("qatscale/")[-1]] += args[0].device.type == "cuda"
            ours = not asks.startswith("deepspeed/")  # isfinite is true of ours, and DeepSpeed sees no overflow
            return ours if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if "aten.nonzero" in name:  # as many documents as there may be
            return torch.empty(37, args[0].ndim, dtype=torch.int64, device=args[0].device)
        return function(*args, **(kwargs or {}))

    def taken(self):
        found, self.places = self.places, Counter()
        return {place: count for place, count in found.items() if count}


def main() -> None:
    from qatscale.config.ds_config import merge_ds_config, run_ds_config
    from qatscale.config.recipe import load_run_config
    from qatscale.engine.checkpoints.save import slices_of
    from qatscale.engine.layout_plan import plan_layout
    from qatscale.engine.runtime import start_runtime
    from qatscale.engine.step import apply_settings, evaluation_loss, train_step
    from qatscale.errors import UserError
    from qatscale.schedule.build import build_timeline
    from qatscale.train.checkpointing import HostCopy
    from qatscale.train.metrics import Meter
    from qatscale.train.setup import assemble
    from qatscale.train.validation import open_view

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    os.environ["LOCAL_RANK"] = "8"
    with contextlib.suppress(UserError):
        start_runtime()
        raise AssertionError("a ninth process on eight GPUs")
    os.environ["LOCAL_RANK"] = "0"
    runtime = start_runtime()
    assert (runtime.device, runtime.device_name) == (torch.device("cuda", 0), GPU)
    import deepspeed
    from deepspeed.runtime.zero import partitioned_param_coordinator

    deepspeed.init_distributed(dist_backend="nccl", verbose=False)  # start_runtime calls it before there is a group

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None  # it compares what ranks have read
    small = ["tokens=1M", "batch.sequences=16", "batch.micro_batch=2", "model.hidden_size=256", "log_interval=1"]
    config = load_run_config("debug", [*small, "schedule.warmup_tokens=0", "qat.scheme=fused", *sys.argv[1:]])
    ds_config, timeline = run_ds_config(config), build_timeline(config)
    layout = plan_layout(config, ds_config, 4)
    merged = merge_ds_config(config, ds_config, layout.data)
    end, steps, switch = 7 if config.data.document_mask else None, [], timeline.switch_step
    with FakeTensorMode(allow_non_fake_inputs=True), Reads() as reads:
        job = assemble(config, layout, merged, runtime, switch, end)
        meter, timed = Meter(config, runtime, "bf16"), contextlib.nullcontext
        if job.stopwatch:
            timed = job.stopwatch if job.times_forward else timed
        for step in (0, 1, switch, switch + 1):
            assert (job.plugin.maybe_switch(step, job.masters) is not None) == (step == switch)
            settings = timeline.at(step)
            apply_settings(job.engine, settings)
            if settings.quantized:
                job.qat_metrics.before_step()
            if job.stopwatch:
                job.stopwatch.on = True
            shape = (config.batch.sequences // layout.data, config.data.sequence_length + 1)
            batch = torch.from_numpy(np.random.default_rng(step).integers(0, 100, shape))
            reads.taken()
            for loss in train_step(job.engine, batch, config.batch.micro_batch, job.topology, timed):
                meter.add_loss(loss)
            meter.end_step(updated=job.guard.after_step() is None)
            steps.append(reads.taken())
            counts = job.qat_metrics.counts() if settings.quantized else None
            meter.read(step + 1, settings, job.engine, counts, job.stopwatch.read() if job.stopwatch else None)
        slices = slices_of(job.masters)
        copy = HostCopy(slices)
        copies = copy.take(slices)
        copy.close()
        job.masters.refresh_working_copies()
        job.plugin.check_moving(job.masters)
        views = []
        if layout.pipeline == 1:
            job.engine.eval()
            for name in ("fp", "quantized", "ptq4"):
                with open_view(job.engine.module, name), torch.no_grad():
                    tokens = torch.zeros(2, config.data.sequence_length, dtype=torch.long).to("cuda")
                    loss = evaluation_loss(job.engine, job.topology)(tokens, tokens)
                    views.append([str(loss.device), str(loss.dtype)])
        optimizer, devices = type(job.engine.optimizer).__name__, {str(s.device) for s in slices.values()}
        job.engine.destroy()
    copied = {str(copy.device) for copy in copies.values()}
    print(
        json.dumps({"optimizer": optimizer, "masters": [*devices], "copies": [*copied], "views": views, "reads": steps})
    )


if __name__ == "__main__":
    main()
