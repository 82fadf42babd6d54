"""What can be rotated: residual streams as a whole, and the values of attention head by head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..equalizing.norms import Norm
from ..equalizing.readers import can_read
from .spaces import Space, Watch

Head = tuple[int, ...]  # features


@dataclass(frozen=True)
class Stream:
    """A residual stream: what writes it, what normalizes it, and for whom."""

    name: str
    size: int
    writers: tuple[Any, ...]
    norms: dict[Norm, tuple[Any, ...]]
    readers: tuple[Any, ...]  # without a norm between


@dataclass(frozen=True)
class Values:
    """Heads, as features of what writes values, and which feature each input of a reader holds."""

    writer: Any
    heads: tuple[Head, ...]
    readers: dict[Any, Tensor]


def streams(watch: Watch) -> tuple[list[Stream], dict[str, str]]:
    """Return the residual streams that can be rotated, and why others cannot, by their names."""
    found, refused = [], {}
    for space in dict.fromkeys(space.root() for space in watch.spaces.values()):
        if space.norms:
            name = _name(watch, space)
            why = next(_obstacles(watch, space), None)
            if why:
                refused[name] = why
            else:
                found.append(_stream(watch, space, name))
    for norm in watch.norms:
        if watch.read_by(norm) == {None}:
            refused[watch.names[norm]] = "what it normalizes holds more than modules wrote"
    return found, refused


def values(watch: Watch) -> list[Values]:
    """Return the values whose heads can be rotated, each by itself."""
    found = []
    for space in dict.fromkeys(space.root() for space in watch.spaces.values()):
        writers = list(space.writers)
        if space.heads and not space.norms and len(writers) == 1 and can_read(writers[0]):
            leaked = {feature for _, features in space.leaks for feature in features}
            heads = sorted(head for head in space.heads if _is_whole(head, space, leaked))
            are_apart = len({f for head in heads for f in head}) == sum(map(len, heads))
            if heads and are_apart and not _are_shared(watch, space):
                found.append(Values(writers[0], tuple(heads), dict(space.readers)))
    return found


def _name(watch: Watch, space: Space) -> str:
    return watch.names[next(iter(space.norms))]


def _stream(watch: Watch, space: Space, name: str) -> Stream:
    norms = {}
    for module in space.norms:
        output = watch.spaces[module].root()
        norms[watch.norms[module]] = tuple(output.readers)
    return Stream(name, space.size, tuple(space.writers), norms, tuple(space.readers))


def _obstacles(watch: Watch, space: Space) -> Iterator[str]:
    names = watch.names
    yield from (
        f"{names[writer]} normalizes what goes on in it, which is no pre-norm"
        for writer in space.writers
        if writer in watch.norms
    )
    yield from (f"it goes into {where}" for where, _ in space.leaks)
    if _is_mixed_in_parts(space):
        yield "attention mixes its tokens, and those of each head in its own way"
    for norm in space.norms:
        output = watch.spaces[norm].root() if norm in watch.norms else None
        if output is None or watch.read_by(norm) != {space}:
            yield f"{names[norm]} normalizes other things too"
        else:
            yield from (f"the output of {names[norm]} goes into {w}" for w, _ in output.leaks)
            if len(output.writers) > 1 or output.norms or _is_mixed_in_parts(output):
                yield f"the output of {names[norm]} is added to something, normalized, or mixed"
            yield from _of_readers(watch, output)
            if not _can_move_bias(watch.norms[norm], output):
                yield (
                    f"{names[norm]} has a bias, and a weight near zero, before a Linear without one"
                )
    yield from _of_readers(watch, space)
    for part in (*space.writers, *space.norms):
        parameters = [part] if isinstance(part, nn.Parameter) else part.parameters(recurse=False)
        if isinstance(part, nn.Module) and any(p in watch.touched for p in parameters):
            yield f"a parameter of {names[part]} is used by others, outside of it"


def _of_readers(watch: Watch, space: Space) -> Iterator[str]:
    for reader, row in space.readers.items():
        if watch.read_by(reader) != {space}:
            yield f"{watch.names[reader]} reads other things too"
        elif row.tolist() != list(range(space.size)):
            yield f"{watch.names[reader]} reads a part of it"
        elif any(p in watch.touched for p in reader.parameters(recurse=False)):
            yield f"a parameter of {watch.names[reader]} is used by others, outside of it"


def _is_mixed_in_parts(space: Space) -> bool:
    return any(len(head) != space.size for head in space.heads)


def _can_move_bias(norm: Norm, output: Space) -> bool:
    """Tell whether a bias can go into the readers, or else be rotated where it is."""
    if norm.bias is None or norm.gain is None or not norm.bias.any():
        return True
    readers: Any = output.readers
    return all(r.bias is not None for r in readers) or bool(norm.gain.abs().min() > 1e-4)


def _is_whole(head: Head, space: Space, leaked: set[int]) -> bool:
    """Tell whether readers read a head in one piece, or not at all, and nothing else does."""
    size, wanted = len(head), set(head)
    if leaked & wanted or not space.readers:
        return False
    for row in space.readers.values():
        features = row.tolist()
        chunks = [tuple(features[i : i + size]) for i in range(0, len(features), size)]
        if any(wanted & set(chunk) and chunk != head for chunk in chunks):
            return False
    return True


def _are_shared(watch: Watch, space: Space) -> bool:
    parts: list[Any] = [*space.writers, *space.readers]
    return any(watch.read_by(reader) != {space} for reader in space.readers) or any(
        p in watch.touched for part in parts for p in part.parameters(recurse=False)
    )
