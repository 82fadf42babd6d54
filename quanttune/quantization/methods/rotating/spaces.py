"""Which modules write the channels of a tensor and which read them, found by watching a forward."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ...functional.functional_sites import SUMS
from ..equalizing.norms import Norm, may_normalize, norm_of
from ..equalizing.readers import can_read
from .moves import CASTS, CREATES, MEANS, MOVES, PRODUCTS, SCALES, compact, is_number
from .parts import CONVOLUTIONS, can_write

_Tag = tuple["Space", Tensor]  # of each element of a tensor: which feature of the space it holds


class Space:
    """Features that are written together: whoever rotates one of them rotates all.

    writers: modules, or parameters that are no module's weight. norms: what normalizes them.
    readers: Linear modules, and which feature each of their inputs holds. heads: features that
    attention mixes over tokens only. leaks: features that something else takes, and what.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.writers: dict[Any, None] = {}
        self.norms: dict[nn.Module, None] = {}
        self.readers: dict[nn.Module, Tensor] = {}
        self.heads: set[tuple[int, ...]] = set()
        self.leaks: list[tuple[str, set[int]]] = []
        self._same_as: Space | None = None

    def root(self) -> "Space":
        return self if self._same_as is None else self._same_as.root()

    def join(self, other: "Space") -> None:
        """Become one with another space of the same size."""
        one, two = self.root(), other.root()
        if one is not two:
            one.writers |= two.writers
            one.norms |= two.norms
            one.readers |= two.readers
            one.heads |= two.heads
            one.leaks += two.leaks
            two._same_as = one


class Watch(TorchFunctionMode):
    """Follow what modules write through a forward of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self.names |= {parameter: name for name, parameter in model.named_parameters()}
        self.spaces: dict[Any, Space] = {}  # by what writes
        self.norms: dict[nn.Module, Norm] = {}
        self.touched: set[nn.Parameter] = set()  # what is computed with outside of its module
        self._inputs: dict[nn.Module, set[Space | None]] = {}
        self._tags = WeakTensorKeyDictionary()
        self._calls: list[str] = []
        self._depth = 0  # of calls whose inside does not matter

    def handles(self) -> Iterator[RemovableHandle]:
        """Register hooks."""
        for module in self._model.modules():
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield module.register_forward_hook(self._leave)
        yield self._model.register_forward_hook(self._end)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tags = [self._tag_of(x) for x in tensors]  # before func changes one in place
        result = func(*args, **kwargs)
        makes = func not in CREATES and any(isinstance(x, Tensor) for x in tree_leaves(result))
        if any(tags) and makes:
            self._pass_on(func, args, kwargs, tensors, tags, result)
        return result

    def _pass_on(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], tags: list[Any], result: Any
    ) -> None:
        known = [tag for tag in tags if tag]
        self.touched |= {x for x in tensors if isinstance(x, nn.Parameter)}
        first = tags[0] if args and args[0] is tensors[0] else None
        if func in CASTS:
            if first:  # else it is given for its type
                self._tag(result, first)
        elif func in MOVES and len(known) == 1 and first:
            labels = _moved(func, first[1], args, kwargs)
            one = isinstance(labels, Tensor)
            for x, y in zip([result] if one else result, [labels] if one else labels, strict=True):
                self._tag(x, (first[0], y))
        elif (
            func in SCALES
            and len(known) == 1
            and not kwargs
            and (first or "div" not in func.__name__)  # one over x is no scaling of it
            and all(is_number(x) for x in args if x is not tensors[tags.index(known[0])])
        ):
            self._tag(result, known[0])
        elif func in MEANS and first:
            self._average(func, args, kwargs, first, result)
        elif func in SUMS and len(args) == 2 and not kwargs and len(known) == 2:
            self._join(known, result)
        elif func in (torch.cat, torch.concat):
            self._concatenate(args, kwargs, tags, tensors, result)
        elif func is F.scaled_dot_product_attention:
            self._attend(args, kwargs, result)
        elif func in PRODUCTS and not tags[0] and tags[1]:
            self._mix(tags[1], result)
        else:
            self._leak(known, func)

    def _average(self, func: Any, args: Any, kwargs: Any, tag: _Tag, result: Tensor) -> None:
        labels = tag[1].double()
        where = {name: x for name, x in kwargs.items() if name != "dtype"}
        mean = func(labels, *args[1:], **where)
        low = labels.amin(*args[1:], **where)
        if torch.equal(low, mean):
            self._tag(result, (tag[0], low.to(tag[1].dtype)))
        else:
            self._leak([tag], func)

    def _join(self, tags: list[Any], result: Tensor) -> None:
        (one, labels), (other, others) = tags
        if one.root().size == other.root().size and _equal(labels, others):
            one.join(other)
            self._tag(result, (one, labels.expand(result.shape)))
        else:
            self._leak(tags, "a sum")

    def _concatenate(
        self, args: Any, kwargs: Any, tags: list[Any], tensors: list[Tensor], result: Tensor
    ) -> None:
        parts = [tag for tag, x in zip(tags, tensors, strict=True) if x.numel()]
        if all(parts) and len({tag[0].root().size for tag in parts}) == 1:
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            for tag in parts[1:]:
                parts[0][0].join(tag[0])
            self._tag(result, (parts[0][0], torch.cat([labels for _, labels in parts], axis)))
        else:
            self._leak([tag for tag in tags if tag], torch.cat)

    def _attend(self, args: Any, kwargs: Any, result: Tensor) -> None:
        names = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        others = [self._tag_of(x) for x in (names["query"], names["key"])]
        self._leak([tag for tag in others if tag], F.scaled_dot_product_attention)
        if tag := self._tag_of(names["value"]):
            self._mix(tag, result)

    def _mix(self, tag: _Tag, result: Tensor) -> None:
        """Note that tokens were mixed, of which each held the same features, head by head."""
        space, labels = tag
        if labels.dim() < 3 or not (labels[..., :1, :] == labels).all():
            return self._leak([tag], torch.matmul)
        heads = labels[..., 0, :]
        space.root().heads |= {tuple(row) for row in heads.flatten(0, -2).unique(dim=0).tolist()}
        if labels.dim() == 4 and result.shape[1] != labels.shape[1]:  # grouped queries
            labels = labels.repeat_interleave(result.shape[1] // labels.shape[1], 1)
        return self._tag(result, (space, labels[..., :1, :].expand(result.shape)))

    def _leak(self, tags: list[Any], taker: Any) -> None:
        what = getattr(taker, "__name__", taker)
        where = self._calls[-1] if self._calls and self._calls[-1] else "the model"
        for space, labels in tags:
            features = set(compact(labels).unique().tolist())
            space.root().leaks.append((f"{what} in {where}", features))

    def _tag_of(self, x: Any) -> Any:
        """Return what a tensor holds, if nothing changed it in place since that was known."""
        if not isinstance(x, Tensor):
            return None
        if isinstance(x, nn.Parameter):
            return self._written(x, x) if x.dim() else None
        tag, version = self._tags.get(x, (None, 0))
        return tag if tag is not None and x._version == version else None

    def _tag(self, x: Tensor, tag: _Tag) -> None:
        self._tags[x] = (tag[0].root(), tag[1]), x._version

    def _written(self, writer: Any, x: Tensor, axis: int = -1) -> _Tag:
        space = self.spaces.setdefault(writer, Space(x.shape[axis])).root()
        space.writers[writer] = None
        labels = torch.arange(x.shape[axis], dtype=torch.int32, device=x.device)
        return space, labels.view(-1, *[1] * (-1 - axis)).expand(x.shape)

    def read_by(self, module: nn.Module) -> set[Space | None]:
        """Return the spaces that a module was given; None stands for what has none."""
        return {space and space.root() for space in self._inputs.get(module, set())}

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._calls.append(self.names[module])
        if self._depth or can_write(module) or may_normalize(module):
            self._depth += 1
        if self._depth != 1:
            return
        # no hook of ours reads what is passed by name
        self._leak([tag for x in tree_leaves(kwargs) if (tag := self._tag_of(x))], "a keyword")
        tag = self._tag_of(args[0]) if args else None
        self._inputs.setdefault(module, set()).add(tag[0] if tag else None)
        if tag:
            self._read(module, *tag)

    def _read(self, module: nn.Module, space: Space, labels: Tensor) -> None:
        row = labels.reshape(-1, labels.shape[-1])[0]
        is_plain = bool((labels == row).all())
        if is_plain and may_normalize(module) and row.tolist() == list(range(space.root().size)):
            space.root().norms[module] = None
        elif is_plain and can_read(module):
            space.root().readers[module] = row
        else:
            self._leak([(space, labels)], "the input")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth == 1:
            norm = norm_of(module, args[0], output) if args and may_normalize(module) else None
            if norm:
                self.norms[module] = norm
            if norm or can_write(module):
                axis = 1 - module.weight.dim() if isinstance(module, CONVOLUTIONS) else -1
                self._tag(output, self._written(module, output, axis))
            elif args and (tag := self._tag_of(args[0])):
                self._leak([tag], "the input")
        self._depth = max(0, self._depth - 1)
        self._calls.pop()

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        self._leak([tag for x in tree_leaves(output) if (tag := self._tag_of(x))], "the output")


def _moved(func: Any, labels: Tensor, args: Any, kwargs: Any) -> Any:
    try:
        return func(labels, *args[1:], **kwargs)
    except RuntimeError:  # labels have other strides than their tensor, whose view this is
        return func(labels.contiguous(), *args[1:], **kwargs)


def _equal(one: Tensor, other: Tensor) -> bool:
    one, other = torch.broadcast_tensors(one, other)
    return torch.equal(one, other)
