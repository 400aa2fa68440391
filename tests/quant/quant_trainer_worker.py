"""One of two processes of transformers' Trainer under DeepSpeed: what it logs, and the model that the plugin exports.

python quant_trainer_worker.py FOLDER STAGE   (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed.ops
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from qatscale.quant.plugin import PlainMasters, QatPlugin  # noqa: E402
from tests.quant.test_quant_elsewhere import QAT, a_qwen, trainer_of  # noqa: E402


def main() -> None:
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    model, plugin = a_qwen(), QatPlugin(QAT, 2)
    ds = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trainer, callback = trainer_of(folder / "out", model, plugin, per_device_train_batch_size=2, deepspeed=ds)
    trainer.train()
    refused = ""
    try:
        PlainMasters(trainer.optimizer)
    except TypeError as error:
        refused = str(error)
    plugin.export(model, folder / "model", callback.masters)
    if torch.distributed.get_rank() == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = {"losses": losses, "switched_at": plugin.switched_at, "refused": refused}
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
