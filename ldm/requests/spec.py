"""Which image becomes what: of flags, of a table of pairs, of a YAML specification, or of one of His-MMDM.

A specification of this toolkit names a default and files that differ from it:

    default:
      source: {class: LUAD}
      targets: [{class: BRCA}, {label: low, class: COAD, score: 0.1}]
      edits: [expression=MKI67:0:1:5]
    files:
      a.png: {source: {class: COAD}, targets: [{class: LUAD}]}

One of His-MMDM (YAML, or a pickle of plain values) names for every file what changes, a value for each image to make;
None leaves the source's:

    TCGA-COAD__a.png: {contents: {y: [TCGA-BRCA, null], genomics_mutation: {TP53: [1, 0]}}, labels: [b, c]}

or, in the layout that its script reads, {modifications: {default: ..., custom: {file: ...}}, fn_list: [file, ...]}.
The class of a source is the beginning of the file's name, up to two underscores.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.conditioners.base import Conditioner
from ldm.conditioners.compose import keys_of, known_key, parse_conditions
from ldm.errors import UserError, some, suggest
from ldm.foreign.pickles import check_pickle
from ldm.foreign.settings import read_yaml
from ldm.foreign.shape import LIST, MAPPING, TEXT, Is, check_shape, maybe
from ldm.requests.edits import Target, completed, edited, gene_values, parse_edits, safe
from ldm.tables.text import read_table

OWN = ("default", "files")
ENTRY = ("source", "targets", "edits")
_TARGET = Is("text or `key: value` pairs", lambda value: isinstance(value, (str, Mapping)))
_ENTRY = maybe({"source?": maybe(MAPPING), "targets?": maybe([_TARGET]), "edits?": maybe([TEXT])})
_FORM = {"default?": _ENTRY, "files?": maybe({"*": _ENTRY})}
_MMDM_ENTRY = maybe({"contents": MAPPING, "labels?": maybe(LIST)})
_MMDM_FORM = {"default?": _MMDM_ENTRY, "custom?": maybe({"*": _MMDM_ENTRY})}
MMDM = {
    "y": "class",
    "genomics_mutation": "mutation",
    "transcriptomics_exp": "expression",
    "genomics_multiplier": "mutation_multiplier",
    "transcriptomics_multiplier": "expression_multiplier",
}
PREFIX = "sample_"  # of labels, as His-MMDM names its files


@dataclass
class Plan:
    """What one image is, and what it becomes."""

    source: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)


def plan_of_flags(
    conditioner: Conditioner | None, source: Mapping[str, Any], targets: Sequence[str], edits: Sequence[str]
) -> Plan:
    """The plan of `--source`, whose values are given, `--target` and `--edit`: targets are set over the source's
    values, edits make further ones.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> plan_of_flags(conditioner, {"class": "COAD"}, ["class=HNSC"], []).targets
    [Target(label='HNSC', values={'class': 'HNSC'})]
    """
    if conditioner is None:
        if source or targets or edits:
            raise UserError("the model is unconditional; it takes no source, target or edit.")
        return Plan(targets=[Target("reconstructed")])
    made = [_parse_target(conditioner, text) for text in targets]
    changes = parse_edits(conditioner, edits)
    source = completed(conditioner, source, changes)
    return _over(Plan(dict(source), [*made, *(edited(conditioner, source, changes) if changes else [])]))


def _parse_target(conditioner: Conditioner, text: str) -> Target:
    """A target of "class=LUAD", of several conditions, "class=LUAD; score=0.3", or named, "low: class=LUAD"."""
    label, colon, rest = text.partition(": ")
    if not colon or "=" in label:
        label, rest = "", text
    items = [item.strip() for item in rest.split(";") if item.strip()]
    if not items:
        raise UserError(f"a target is name=value, as class=LUAD, several of them joined by ;; got '{text}'.")
    values = parse_conditions(conditioner, items)
    words = [item.partition("=")[2] if item.startswith("class=") else item.replace("=", "-") for item in items]
    return Target(safe(label or "_".join(words)), values)


def _over(plan: Plan) -> Plan:
    """The plan whose targets have the source's values where they say nothing; UserError for labels that are alike."""
    for target in plan.targets:
        target.values = {**plan.source, **target.values}
    labels = [target.label for target in plan.targets]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two targets are called '{twice}'; name one of them: --target 'name: class=...'.")
    return plan


def read_spec(
    path: Path, conditioner: Conditioner, names: Sequence[str], own: Callable[[str], Mapping[str, Any]]
) -> dict[str, Plan]:
    """Plans by the name of the image's file.

    names: files that there are. own: what is known of a file besides, such as its genes in a table.
    Raises:
        UserError: an unreadable file or another layout, files that are not there, unknown classes and genes.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> Path("spec.yaml").write_text("default: {targets: [class=HNSC]}")
    32
    >>> read_spec(Path("spec.yaml"), conditioner, ["a.png"], lambda name: {"class": "COAD"})
    {'a.png': Plan(source={'class': 'COAD'}, targets=[Target(label='HNSC', values={'class': 'HNSC'})])}
    """
    content = load_spec(path)
    if "modifications" in content:
        return _of_mmdm(path, content["modifications"], content.get("fn_list"), conditioner, names, own)
    if content and all(isinstance(entry, Mapping) and "contents" in entry for entry in content.values()):
        return _of_mmdm(path, {"custom": content}, list(content), conditioner, names, own)
    if unknown := sorted(map(str, content.keys() - set(OWN))):
        raise UserError(f"{path}: no section '{unknown[0]}'{suggest(unknown[0], OWN)}")
    check_shape(content, _FORM, path)
    default, files = content.get("default") or {}, content.get("files") or {}
    _check_names(path, files, names)
    plans = {}
    for name in names if default else files:
        entry = {**default, **(files.get(name) or {})}
        if unknown := sorted(map(str, entry.keys() - set(ENTRY))):
            raise UserError(f"{path}: {name} has no setting '{unknown[0]}'{suggest(unknown[0], ENTRY)}")
        source = {**own(name), **_values(conditioner, entry.get("source") or {})}
        changes = parse_edits(conditioner, entry.get("edits") or [])
        source = completed(conditioner, source, changes)
        targets = [_named_target(conditioner, given) for given in entry.get("targets") or []]
        plan = Plan(source, [*targets, *(edited(conditioner, source, changes) if changes else [])])
        if not plan.targets:
            raise UserError(f"{path}: {name} has neither targets nor edits.")
        plans[name] = _over(plan)
    return plans


def load_spec(path: Path) -> dict[str, Any]:
    """The mapping in a .yaml, or in a .pkl of plain values (of which nothing is executed).

    >>> Path("spec.yaml").write_text("files: {a.png: {targets: [class=HNSC]}}")
    39
    >>> load_spec(Path("spec.yaml"))
    {'files': {'a.png': {'targets': ['class=HNSC']}}}
    """
    if not path.is_file():
        raise UserError(f"there is no specification at {path}.")
    try:
        if path.suffix in (".pkl", ".pickle"):
            stream = io.BytesIO(path.read_bytes())
            check_pickle(stream)
            content = _Plain(stream).load()
        else:
            content = read_yaml(path, "the specification")
    except UserError:
        raise
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, IndexError, KeyError) as error:
        raise UserError(f"the specification {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"the specification {path} holds a {type(content).__name__}, not files with what they become.")
    return dict(content)


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, tuples, texts and numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}; save plain dicts, lists, texts and numbers")


def _values(conditioner: Conditioner, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by condition of a YAML mapping: texts as a command line has them, or numbers and mappings."""
    if not isinstance(given, Mapping):
        raise UserError(f"conditions are name: value, as class: LUAD; got {given!r:.60}.")
    values = {}
    for name, value in given.items():
        key = known_key(conditioner, str(name))
        values[key] = value if isinstance(value, Mapping) else conditioner.parse(key, str(value))
    return values


def _named_target(conditioner: Conditioner, given: Any) -> Target:
    if isinstance(given, str):
        return _parse_target(conditioner, given)
    given = dict(given)
    label = given.pop("label", None) or "_".join(
        str(value) if name == "class" else f"{name}-{value}" for name, value in given.items()
    )
    return Target(safe(str(label)), _values(conditioner, given))


def _check_names(path: Path, wanted: Sequence[str] | Mapping[str, Any], names: Sequence[str]) -> None:
    if missing := [str(name) for name in wanted if name not in names]:
        raise UserError(f"{path} names {len(missing)} files that are not among the images: {some(missing, 5)}")


def _of_mmdm(
    path: Path,
    modifications: Mapping[str, Any],
    listed: Sequence[str] | None,
    conditioner: Conditioner,
    names: Sequence[str],
    own: Callable[[str], Mapping[str, Any]],
) -> dict[str, Plan]:
    check_shape(modifications, _MMDM_FORM, f"{path}: modifications")
    check_shape(listed, maybe([TEXT]), f"{path}: fn_list")
    default, custom = modifications.get("default"), modifications.get("custom") or {}
    _check_names(path, [*custom, *(listed or [])], names)
    plans = {}
    for name in listed if listed is not None else names:
        entry = custom.get(name, default)
        if entry is None:
            continue
        source = {**mmdm_source(conditioner, name), **own(name)}
        plans[name] = _over(_mmdm_plan(f"{path}: {name}", entry, conditioner, source, name in custom))
    return plans


def mmdm_source(conditioner: Conditioner, name: str) -> dict[str, Any]:
    """The class that a file's name begins with, "TCGA-COAD__image_01.png", where the model knows classes.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> mmdm_source(conditioner, "COAD__a.png")
    {'class': 'COAD'}
    """
    key = next(iter(keys_of(conditioner, "class")), None)
    head, underscores, _ = name.partition("__")
    return {key: conditioner.parse(key, head)} if key and underscores else {}


def _mmdm_plan(where: str, entry: Any, conditioner: Conditioner, source: Mapping[str, Any], strict: bool) -> Plan:
    """The plan of {contents, labels}. strict: genes that the model lacks are an error, else they are left out."""
    contents = entry.get("contents") if isinstance(entry, Mapping) else None
    if not isinstance(contents, Mapping) or not contents:
        raise UserError(f"{where} has no `contents`, what changes.")
    if unknown := sorted(map(str, contents.keys() - set(MMDM))):
        raise UserError(f"{where}: `contents` has '{unknown[0]}'{suggest(unknown[0], MMDM)}")
    about = conditioner.describe()
    lists = {
        (name, gene): values
        for name, given in contents.items()
        for gene, values in (given.items() if isinstance(given, Mapping) else [(None, given)])
    }
    counts = {len(values) if isinstance(values, list) else 0 for values in lists.values()}
    if len(counts) > 1 or not counts or 0 in counts:
        raise UserError(f"{where}: `contents` are lists of one length, a value for each image to make.")
    count = counts.pop()
    labels = entry.get("labels") or list(range(count))
    if len(labels) != count:
        raise UserError(f"{where} has {len(labels)} labels for {count} images.")
    source, targets = dict(source), []
    for name in {name for name, gene in lists if gene is not None}:
        key = known_key(conditioner, MMDM[name])
        source[key] = gene_values(source.get(key), about[key].genes)
    for index, label in enumerate(labels):
        values = dict(source)
        for (name, gene), given in lists.items():
            key, value = known_key(conditioner, MMDM[name]), given[index]
            if value is None:
                continue
            if gene is None:
                kinds = about[key].names
                values[key] = kinds[value] if kinds and isinstance(value, int) else conditioner.parse(key, str(value))
                continue
            genes = about[key].genes
            if isinstance(gene, str) and gene not in genes:
                if strict:
                    raise UserError(f"{where}: the model has no gene '{gene}' in '{key}'{suggest(gene, genes)}")
                continue
            own = values[key].copy()
            own[genes.index(gene) if isinstance(gene, str) else gene] = value
            values[key] = own
        targets.append(Target(safe(f"{PREFIX}{label}"), values))
    return Plan(source, targets)


def read_pairs(
    path: Path, conditioner: Conditioner, names: Sequence[str], own: Callable[[str], Mapping[str, Any]]
) -> dict[str, Plan]:
    """Plans of a CSV or TSV: columns `file`, `source.<condition>`, `target.<condition>`, and `label` if wanted; a row
    for each image to make.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> pd.DataFrame({"file": ["a.png"], "target.class": ["HNSC"]}).to_csv("pairs.csv", index=False)
    >>> read_pairs(Path("pairs.csv"), conditioner, ["a.png"], lambda name: {"class": "COAD"})
    {'a.png': Plan(source={'class': 'COAD'}, targets=[Target(label='HNSC', values={'class': 'HNSC'})])}
    """
    rows = read_table(path, missing=("",)).fillna("").to_dict("records")
    if "file" not in rows[0]:
        raise UserError(f"{path} is a table with a column `file`, and source.<condition> and target.<condition> ones.")
    for column in rows[0]:
        if column not in ("file", "label") and not str(column).startswith(("source.", "target.")):
            raise UserError(f"{path}: no column is called '{column}'; columns are file, label, source.x and target.x.")
    _check_names(path, list(dict.fromkeys(row["file"] for row in rows)), names)
    plans: dict[str, Plan] = {}
    for number, row in enumerate(rows, 2):
        values: dict[str, dict[str, Any]] = {"source": {}, "target": {}}
        for column, text in row.items():
            side, _, name = str(column).partition(".")
            if side in values and text:
                key = known_key(conditioner, name)
                values[side][key] = conditioner.parse(key, text)
        if not values["target"]:
            raise UserError(f"{path}: row {number} has no target.")
        words = "_".join(f"{row[c]}" for c in row if str(c).startswith("target.") and row[c])
        values["source"] = {**own(row["file"]), **values["source"]}
        plan = plans.setdefault(row["file"], Plan(values["source"]))
        if repr(plan.source) != repr(values["source"]):
            raise UserError(f"{path}: row {number} gives {row['file']} another source than a row before it.")
        plan.targets.append(Target(safe(row.get("label") or words), values["target"]))
    return {name: _over(plan) for name, plan in plans.items()}
