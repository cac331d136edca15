"""A batch whose loss was not finite, kept so that it can be run again: `m5 replay RUN`.

RUN/replay/batch.safetensors     the batch of all ranks as one rank builds it; its metadata has what is no tensor
RUN/replay/weights.safetensors   the whole weights before the step, which the step has not changed
RUN/replay/step.json             where in the training it was
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from m5.assemble import build_model
from m5.batch import Batch, jagged
from m5.config import RunConfig
from m5.losses import M5Train
from m5.schema import DataError, PreparedDataset

FOLDER = "replay"


def save_batch(batch: Batch, path: Path) -> None:
    """Tensors under their names, jagged features as `sparse.history` and so on; plain values as metadata."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.cpu().contiguous()
        elif isinstance(value, KeyedJaggedTensor):
            # Cloned: the keys' values are views of one storage, which safetensors refuses.
            tensors |= {f"{field.name}.{key}": value[key].values().cpu().clone() for key in value.keys()}  # noqa: SIM118
        else:
            plain[field.name] = value
    save_file(tensors, path, metadata={"plain": json.dumps(plain), "order": json.dumps(list(tensors))})


def load_batch(path: Path) -> Batch:
    """The batch that `save_batch` wrote."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(metadata["plain"]).items()
    }
    features: dict[str, dict[str, Tensor]] = {}
    for name in json.loads(metadata["order"]):
        field, _, key = name.partition(".")
        if key:
            features.setdefault(field, {})[key] = tensors[name]
        else:
            values[field] = tensors[name]
    return Batch(**values, **{field: jagged(rows) for field, rows in features.items()})


def save_replay(run: Path, batch: Batch, state: dict[str, Tensor], position: dict[str, Any]) -> Path:
    """Write RUN/replay; an earlier one is replaced.

    Args:
        batch: of all ranks, as one rank builds it.
        state: the model with its loss, tables whole.
        position: step, epoch, batch and the loss.
    """
    folder, temporary = run / FOLDER, run / f".{FOLDER}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_batch(batch, temporary / "batch.safetensors")
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, temporary / "weights.safetensors")
    (temporary / "step.json").write_text(json.dumps({key: str(value) for key, value in position.items()}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


class _FirstNonFinite:
    """Remembers the first module whose output is not finite, in the order of computation."""

    def __init__(self, model: nn.Module):
        self.name: str | None = None
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _module, _inputs, output, name=name: self._look(name, output))

    def _look(self, name: str, output: object) -> None:
        values = output if isinstance(output, tuple | list) else [output]
        if self.name is None and any(
            isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all() for value in values
        ):
            self.name = name


def replay(run: Path, train_model: M5Train | None = None) -> dict[str, Any]:
    """Run the kept batch again on one process, on the CPU, with the run's precision of the candidate softmax.

    Args:
        run: folder of `m5 train`.
        train_model: to run instead of the one that the run's settings describe.

    Returns:
        The loss, the weights that are not finite, the first module whose output is not, and the gradients that are not.

    Raises:
        DataError: the run has kept no batch.
        ConfigError: it is no run.
    """
    from m5.train import training_model

    folder, config = run / FOLDER, RunConfig.read(run / "config.yaml")
    if not folder.is_dir():
        raise DataError(f"{run} has kept no batch: none of its losses was NaN or infinite.")
    dataset = PreparedDataset(config.data)
    model = train_model or training_model(dataset, config, build_model(dataset, config))
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    first = _FirstNonFinite(model)
    loss, _ = model(load_batch(folder / "batch.safetensors"))
    loss.backward()
    weights = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    gradients = [
        n for n, value in model.named_parameters() if value.grad is not None and not value.grad.isfinite().all()
    ]
    return {"loss": loss.item(), "weights": weights, "module": first.name, "gradients": gradients}


def print_replay(run: Path) -> None:
    found = replay(run)
    position = json.loads((run / FOLDER / "step.json").read_text())
    console = Console(highlight=False, markup=False)
    console.print("kept:", ", ".join(f"{name} {value}" for name, value in position.items()))
    console.print(f"loss now, on one process: {found['loss']}")
    for what in ("weights", "gradients"):
        names = found[what]
        console.print(
            f"{what} that are not finite: {', '.join(names[:10]) or 'none'}{' ...' if len(names) > 10 else ''}"
        )
    console.print(f"first module whose output is not finite: {found['module'] or 'none'}")
    if found["module"] is None:
        console.print("Here all is finite: the run's device or its precision (training.autocast) is a suspect.")
