"""Standard names for the places of a transformer, whatever its library calls them.

``embed``, ``blocks.3``, ``blocks.3.attn``, ``blocks.3.resid_pre``, … are found by structure: the longest
list of alike layers, the order in which modules ran, the dims that were surveyed. What the residual stream
is made of is measured: ``resid_mid`` is ``resid_pre + attn_out`` and ``resid_post`` is that plus ``mlp_out``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flexmagic.layout.dims import Dim
from flexmagic.layout.heads import Heads
from flexmagic.layout.sites import Site

Edit = tuple[Site, tuple[int, ...]]
"""A site, and the features of which the first token's are changed there."""
Look = Callable[[Sequence[Site], int, Edit | None], Mapping[Site, torch.Tensor]]
"""Whole values at sites in a forward of so many tokens in one row, one site changed where that is asked."""

LISTS = ("blocks", "layers")
"""Both mean the list of layers."""
TENSORS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
OF_HEADS = ("pattern", "q", "k", "v", "z")
APART = 3
"""Tokens of the forwards in which queries and keys are told apart."""
_STANDARD = re.compile(r"(blocks|layers)(\..*)?|embed|final_norm|unembed")
_PROJECTIONS = {
    "q": re.compile(r"(^|_)w?q(_|$)|query(?!_key)"),
    "k": re.compile(r"(^|_)w?k(_|$)|(?<!query_)key(?!_value)"),
    "v": re.compile(r"(^|_)w?v(_|$)|(?<!key_)value"),
}


def is_standard(path: str) -> bool:
    """Whether a path may be a standard name, of some model."""
    return _STANDARD.fullmatch(path) is not None


@dataclass(frozen=True)
class Meaning:
    """What a standard name stands for.

    ``port`` is ``""`` for a module, whose sites have the ports that a user names. ``heads``: it is a view of
    the site's features. ``missing``: why this model has no such place.
    """

    path: str = ""
    port: str = ""
    leaf: str = ""
    heads: Heads | None = None
    missing: str = ""


@dataclass(frozen=True)
class Structure:
    """A model's modules and sites, as far as they tell what is where.

    ``kinds``: class names by path; ``weighted``: the modules that have parameters; ``dims``: of every
    site that is known, in the order in which a forward reached them; ``heads``: of the attention, if
    the configuration says how many.
    """

    kinds: Mapping[str, str]
    weighted: frozenset[str]
    dims: Mapping[Site, tuple[Dim, ...]]
    heads: int | None = None

    def inside(self, path: str) -> list[str]:
        """The modules below a module."""
        return [other for other in self.kinds if other.startswith(f"{path}.")]

    def children(self, path: str) -> list[str]:
        """The modules directly below a module."""
        return [other for other in self.inside(path) if "." not in other[len(path) + 1 :]]

    def width(self, site: Site) -> int | None:
        """The constant length of a site's last dim."""
        dims = self.dims.get(site, ())
        return dims[-1].size if len(dims) > 1 else None

    def first(self, path: str, port: str, width: int) -> Site | None:
        """The first tensor of a module's value that has so many features."""
        found = (s for s in self.dims if (s.path, s.port) == (path, port) and self.width(s) == width)
        return next(found, None)

    def blocks(self) -> list[str]:
        """The paths of the layers: the numbered modules with most below them."""
        lists: dict[str, list[str]] = {}
        for path in self.kinds:
            parent, _, number = path.rpartition(".")
            if number.isdigit() and self.inside(path):
                lists.setdefault(parent, []).append(path)
        most = max(lists, key=lambda p: (len(self.inside(p)), -p.count(".")), default=None)
        return [] if most is None else lists[most]


@dataclass
class Standard:
    """The standard names of one model; ``look`` measures where structure alone does not tell."""

    structure: Structure
    look: Look
    names: dict[str, Meaning] = field(default_factory=dict)
    _flows: dict[tuple[str, ...], dict[str, Meaning]] = field(default_factory=dict)

    def find(self) -> dict[str, Meaning]:
        """Every standard name, those that this model has not with the reason."""
        blocks = self.structure.blocks()
        if not blocks:
            return {}
        self._ends(blocks)
        for number, block in enumerate(blocks):
            for name, meaning in self._in_block(block).items():
                for of in LISTS:
                    self.names[f"{of}.{number}{name}"] = meaning
        return self.names

    def _ends(self, blocks: Sequence[str]) -> None:
        """What stands before and after the layers."""
        s = self.structure
        leaves = [
            site.path
            for site in s.dims
            if site.port == "output" and site.path in s.weighted and site.path and not s.inside(site.path)
            and not any(site.path.startswith(f"{block}.") for block in blocks)
        ]  # fmt: skip
        order = [site.path for site in s.dims if site.port == "output"]
        last = order.index(blocks[-1]) if blocks[-1] in order else len(order)
        after = [path for path in leaves if order.index(path) > last]
        embeddings = [p for p in leaves if "embed" in s.kinds[p].lower() and order.index(p) < last]
        norms = [path for path in after if "norm" in s.kinds[path].lower()]
        heads = [path for path in after if path not in norms]
        for name, found, what in (
            ("embed", embeddings[:1], "no embedding ran before its layers"),
            ("final_norm", norms[-1:], "no normalisation ran after its layers"),
            ("unembed", heads[-1:], "no linear layer ran after its layers"),
        ):
            self.names[name] = Meaning(found[0]) if found else Meaning(missing=what)

    def _in_block(self, block: str) -> dict[str, Meaning]:
        s = self.structure
        out = {"": Meaning(block)} | {path[len(block) :]: Meaning(path) for path in s.inside(block)}
        attention, mlp = self._parts(block)
        for name, path in (("attn", attention), ("mlp", mlp)):
            meaning = Meaning(missing=f"its layers have no module of their own for the {name}")
            if path is not None:
                meaning = Meaning(path)
                out |= {f".{name}{inner[len(path) :]}": Meaning(inner) for inner in s.inside(path)}
            out[f".{name}"] = meaning
        signature = tuple(f"{p[len(block) :]}{s.kinds[p]}" for p in s.inside(block))
        if signature not in self._flows:
            self._flows[signature] = _relative(self._measured(block, attention, mlp), block)
        for name, meaning in self._flows[signature].items():
            out[name] = _at(meaning, block)
        return out

    def _parts(self, block: str) -> tuple[str | None, str | None]:
        """The modules for attention and for the feed-forward part."""
        s = self.structure
        large = [child for child in s.children(block) if s.inside(child)]
        attention = [c for c in large if "att" in c.rpartition(".")[2].lower() or "att" in s.kinds[c].lower()]
        rest = [child for child in large if child not in attention]
        most = max(rest, key=lambda child: len(s.inside(child)), default=None)
        return (attention[0] if attention else None), most

    def _measured(self, block: str, attention: str | None, mlp: str | None) -> dict[str, Meaning]:
        from flexmagic.layout.residual import residual

        out = residual(self.structure, self.look, block, attention, mlp)
        if attention is None:
            return out | {f".attn.{n}": Meaning(missing="its layers have no attention") for n in OF_HEADS}
        return out | self._of_heads(attention)

    def _of_heads(self, attention: str) -> dict[str, Meaning]:
        """The attention's pattern, and its queries, keys, values and results by head."""
        s = self.structure
        patterns = [
            site for site, dims in s.dims.items()
            if (site.path, site.port) == (attention, "output") and len(dims) == 4
            and dims[1].size is not None and [d.name for d in dims[2:]] == ["seq", "seq"]
        ]  # fmt: skip
        missing = 'its attention returns no patterns as it was loaded: load it with attn="eager"'
        out = {f".attn.{n}": Meaning(missing="its projections were not recognised") for n in OF_HEADS}
        out[".attn.pattern"] = (
            Meaning(attention, "output", patterns[0].leaf) if patterns else Meaning(missing=missing)
        )
        count = s.dims[patterns[0]][1].size if patterns else s.heads
        outputs = [
            site for site in s.dims
            if site.port == "output" and site.path.startswith(f"{attention}.") and not site.leaf
            and site.path in s.weighted and not s.inside(site.path)
            and "norm" not in s.kinds[site.path].lower()
        ]  # fmt: skip
        result = None if not outputs else next(
            (x for x in s.dims if (x.path, x.port) == (outputs[-1].path, "input")), None
        )  # fmt: skip
        size = None if result is None else s.width(result)
        if result is None or size is None or not count or size % count:
            return out
        width = size // count
        out[".attn.z"] = Meaning(result.path, "input", result.leaf, Heads.evenly(count, width))
        named = {
            name: next((x for x in outputs[:-1] if how.search(x.path.rpartition(".")[2].lower())), None)
            for name, how in _PROJECTIONS.items()
        }
        for name, site in named.items():
            features = None if site is None else s.width(site)
            if site is not None and features is not None and features % width == 0:
                heads = Heads.evenly(features // width, width)
                out[f".attn.{name}"] = Meaning(site.path, "output", "", heads)
        if not any(named.values()):
            out |= self._fused(outputs[:-1], result, count, width)
        return out

    def _fused(self, sites: Sequence[Site], result: Site, count: int, width: int) -> dict[str, Meaning]:
        """Queries, keys and values that one projection makes; with one token its values are the result.

        Of the rest, the first token's queries change nothing that later tokens get, and its keys do.
        """
        for site in sites:
            features = self.structure.width(site) or 0
            groups, odd = divmod(features // width - count, 2)
            if features % width or odd or groups < 1 or count % groups:
                continue
            values = self.look([site, result], 1, None)
            if site not in values or result not in values:
                continue
            whole, wanted = (values[x].double().reshape(-1) for x in (site, result))
            for heads in _arrangements(count, groups, width):
                value = heads["v"].cut(whole)
                found = value.repeat_interleave(count // groups, 0).reshape(-1)
                if float((found - wanted).abs().max()) <= 1e-2 * float(wanted.abs().max()):
                    named = self._apart(site, result, heads) if count == groups else heads
                    unknown = Meaning(missing=f"what of {site} are queries and what keys cannot be told")
                    return {f".attn.{name}": unknown for name in "qk"} | {
                        f".attn.{name}": Meaning(site.path, "output", "", of) for name, of in named.items()
                    }
        return {}

    def _apart(self, site: Site, result: Site, heads: Mapping[str, Heads]) -> dict[str, Heads]:
        """Which of two parts of a projection are queries, and which keys; neither where that is not seen."""
        plain = self.look([result], APART, None)
        moves = []
        for name in "qk":
            edited = self.look([result], APART, (site, heads[name].columns))
            if result not in plain or result not in edited:
                return {"v": heads["v"]}
            before, after = (of[result].double().reshape(APART, -1)[1:] for of in (plain, edited))
            moves.append(float((after - before).abs().max()) > 1e-3 * float(before.abs().max()))
        if moves == [False, True]:
            return dict(heads)
        return {"v": heads["v"]} | ({"q": heads["k"], "k": heads["q"]} if moves == [True, False] else {})


def _arrangements(count: int, groups: int, width: int) -> list[dict[str, Heads]]:
    """How one projection may hold queries, keys and values: all of each, or for each group of heads."""
    each = count // groups
    stride = (each + 2) * width
    queries = tuple(g * stride + at * width for g in range(groups) for at in range(each))
    return [
        {
            "q": Heads.evenly(count, width),
            "k": Heads.evenly(groups, width, count * width),
            "v": Heads.evenly(groups, width, (count + groups) * width),
        },
        {
            "q": Heads(queries, width),
            "k": Heads.evenly(groups, width, each * width, stride),
            "v": Heads.evenly(groups, width, (each + 1) * width, stride),
        },
    ]


def _relative(names: Mapping[str, Meaning], block: str) -> dict[str, Meaning]:
    return {
        name: m if m.missing else Meaning(m.path[len(block) :], m.port, m.leaf, m.heads)
        for name, m in names.items()
    }


def _at(meaning: Meaning, block: str) -> Meaning:
    if meaning.missing:
        return meaning
    return Meaning(f"{block}{meaning.path}", meaning.port, meaning.leaf, meaning.heads)
