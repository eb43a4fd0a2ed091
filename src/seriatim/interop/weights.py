"""Published weights: one safetensors file or several with an index, never a pickle; every mistake is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from seriatim.interop.blueprint import FINE, Blueprint, Part, how_of
from seriatim.model import Model

INDEX = "model.safetensors.index.json"
NAMED = 5  # names that an error lists
OUTPUTS = "lm_head.weight"


KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Stored:
    """A safetensors file whose tensors are read one by one into memory of their own. Mapped into memory, the parts of a
    matrix that ours holds as one would be there twice."""

    def __init__(self, path: Path):
        with safe_open(str(path), framework="pt") as checked:  # its header is sound, and its size that of its tensors
            self.names = list(checked.keys())
        self.file = open(path, "rb")  # noqa: SIM115 (closed by `opened`)
        length = int.from_bytes(self.file.read(8), "little")
        self.header, self.start = json.loads(self.file.read(length)), 8 + length

    def get_tensor(self, name: str) -> Tensor:
        about = self.header[name]
        if about["dtype"] not in KINDS:
            raise ValueError(f"{self.file.name}: {name} is {about['dtype']}, a format that is not read here")
        begin, end = about["data_offsets"]
        if end == begin:
            return torch.empty(about["shape"], dtype=KINDS[about["dtype"]])
        values = bytearray(end - begin)
        self.file.seek(self.start + begin)
        self.file.readinto(values)
        return torch.frombuffer(values, dtype=KINDS[about["dtype"]]).view(about["shape"])


@contextmanager
def opened(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Every tensor of a folder: its name -> the open file that holds it. Raises FileNotFoundError, ValueError."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in shards(folder):
            try:
                file = Stored(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): it was cut short, or is no safetensors file"
                ) from None
            stack.callback(file.file.close)
            where |= dict.fromkeys(file.names, file)
        yield where


def shards(folder: Path) -> list[Path]:
    """The files of weights, those of the index where there is one. Raises FileNotFoundError that names what is missing,
    ValueError for an index that leads out of the folder."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of weights ({error})") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index} names {name!r}: files of weights stand in the folder itself")
        gone = [name for name in names if not (folder / name).is_file()]
        if gone:
            raise FileNotFoundError(f"{folder} lacks {', '.join(gone)} of its {len(names)} files of weights")
        return [folder / name for name in names]
    found = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    found = found or sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as {', '.join(pickles[:NAMED])}: pickles, which run any code they like when "
            "they are read. Use the model's safetensors files, or convert them where you trust them"
        )
    raise FileNotFoundError(f"{folder} holds no *.safetensors file")


def as_trained(blueprint: Blueprint, files: Mapping[str, Any]) -> Blueprint:
    """Where a table of outputs is stored that differs from that of the embeddings, the two are not tied, whatever the
    config says (as transformers 5 writes that of T5 1.1)."""
    table = _as_stored(next(part for part in blueprint.parts if part.ours == "embed.table"), files).theirs[0]
    if not blueprint.tied or OUTPUTS not in files or table not in files:
        return blueprint
    if torch.equal(files[OUTPUTS].get_tensor(OUTPUTS), files[table].get_tensor(table)):
        return blueprint
    return replace(blueprint, tied=False, parts=(*blueprint.parts, Part("heads.token.weight", (OUTPUTS,))))


def load_into(
    model: Model, blueprint: Blueprint, files: Mapping[str, Any], where: Path, dtype: torch.dtype | None = None
) -> None:
    """Fill a model that was made without memory ("meta") from `opened` files; `where` they stand is for errors.
    `dtype`: the number format (None: that of the files).

    Raises ValueError that names missing, unexpected and misshapen tensors.
    """
    parts = [_as_stored(part, files) for part in blueprint.parts]
    used = {name for part in parts for name in part.theirs}
    missing = sorted(used - set(files))
    if missing:
        raise ValueError(f"{where} lacks {_some(missing)}: it is cut short, or of another model than its config")
    spare = (*blueprint.ignored, *((OUTPUTS,) if blueprint.tied else ()))
    odd = sorted(n for n in set(files) - used if not n.endswith(spare))
    if odd:
        raise ValueError(f"{where} holds tensors that its config does not explain: {_some(odd)}")
    for part in parts:
        _fill(model, part, files, blueprint, where, dtype)
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise AssertionError(f"no published tensor fills {_some(left)}")


def _as_stored(part: Part, files: Mapping[str, Any]) -> Part:
    """Names as these files have them: some leave out the first word, as GPT-2's do."""
    bare = tuple(name.split(".", 1)[-1] for name in part.theirs)
    if not any(name in files for name in part.theirs) and all(name in files for name in bare):
        return part._replace(theirs=bare)
    return part


def _fill(
    model: Model, part: Part, files: Mapping[str, Any], blueprint: Blueprint, folder: Path, dtype: torch.dtype | None
) -> None:
    owner, _, name = part.ours.rpartition(".")
    module = model.get_submodule(owner)
    want = getattr(module, name) if not isinstance(module, nn.ParameterList) else module[int(name)]
    theirs = [files[n].get_tensor(n) for n in part.theirs]
    try:
        ours = how_of(part).together(theirs, blueprint.backbone)
        ours = ours if part.row is None else ours[part.row].clone()
    except RuntimeError:
        ours = None
    if ours is None or ours.shape != want.shape:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(part.theirs[:NAMED], theirs, strict=False))
        raise ValueError(f"{folder}: the config makes {part.ours} {tuple(want.shape)}, the file holds {shapes}")
    if dtype is not None and part.how not in FINE:
        ours = ours.to(dtype)
    made = nn.Parameter(ours, requires_grad=False)
    if isinstance(module, nn.ParameterList):
        module[int(name)] = made
        return
    setattr(module, name, made)
    for same in blueprint.same if part.ours == "embed.table" else ():
        owner, _, name = same.rpartition(".")
        setattr(model.get_submodule(owner), name, made)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
