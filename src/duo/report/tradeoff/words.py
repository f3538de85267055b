"""The trade-off in tables and plain sentences, made from its numbers alone (`duo.report.tradeoff.analyse`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from duo.report.markdown import fill, plain
from duo.report.tradeoff.points import CLEAN, WORST
from duo.report.wording import Finding, attack_words, listed, percent, percent_range, points

SHORT = {"duo", "esd", "ca", "uce", "spm", "fmn", "sa"}  # names that are spelled, not spoken
FEW_ERASURES = 3
ALPHA = 0.05


def method_words(name: str) -> str:
    """A method as it is printed: "DUO", "DUO no pairs"."""
    return " ".join(part.upper() if part in SHORT else part for part in name.replace("-", "_").split("_"))


def panel_title(panel: str) -> str:
    """What a panel or column is called."""
    return {WORST: "Worst case over attacks", CLEAN: "Clean: neither concept nor spoiled"}.get(
        panel, attack_words(panel).label
    )


def tables(analysis: Mapping[str, Any]) -> str:
    """The Markdown of `figure4.md`."""
    seeds = {one["method"]: len(one["seeds"]) for one in analysis["methods"]}
    least = min(seeds.values(), default=0)
    reference = analysis["reference"] if analysis["reference"] in seeds else None
    return fill(
        "tradeoff/tables.md",
        bench=analysis["bench"],
        cells=analysis["cells"],
        erasures=", ".join(f"{plain(method_words(name))} {count}" for name, count in seeds.items()),
        few=FEW_ERASURES if least <= FEW_ERASURES else None,
        single=[plain(method_words(name)) for name, count in seeds.items() if count == 1],
        controls=[_control(row) for row in analysis["rows"]],
        reference=plain(method_words(reference)) if reference else None,
        rivals=len(seeds) - 1,
        floors=[_floor(matched, analysis) for matched in analysis["matched"]],
        over=analysis["over"],
        areas=_areas(analysis),
        readings=[_reading(panel, analysis) for panel in analysis["panels"]],
        points=_points(analysis),
        intervals=analysis["intervals"],
    )


# --- cells of tables ----------------------------------------------------------------------------------


def share(value: Mapping[str, Any] | None) -> str:
    """ "93% (86–97)" """
    return f"{percent(value['mean'])} ({percent_range(value['low'], value['high'])[:-1]})" if value else "—"


def number(value: Mapping[str, Any] | None) -> str:
    """ "0.914 (0.901–0.928)" """
    return f"{value['mean']:.3f} ({value['low']:.3f}–{value['high']:.3f})" if value else "—"


def strength_words(strength: Any) -> str:
    """A strength as its folder is called: "0.0001"; "as it is" where nothing is swept."""
    if strength is None:
        return "as it is"
    return f"{strength:g}" if isinstance(strength, float) else plain(str(strength))


def _control(row: Mapping[str, Any]) -> list[str]:
    label = plain(panel_title(row["row"]))
    undefined = [f"{plain(method_words(name))}: {plain(why)}" for name, why in row["not_defined"].items()]
    if undefined:
        label += f" (not defined for {'; '.join(undefined)})"
    needed = percent(row["needed"]) if row["needed"] is not None else "—"
    return [label, share(row["control"]), needed, "yes" if row["reliable"] else "**no**", share(row["never"])]


def _floor(matched: Mapping[str, Any], analysis: Mapping[str, Any]) -> dict[str, Any]:
    """One table: a row per method at this floor."""
    names = [row["row"] for row in analysis["rows"]]
    unreliable = {row["row"] for row in analysis["rows"] if not row["reliable"]}
    heads = [plain(panel_title(name)) + (" (unreliable)" if name in unreliable else "") for name in names]
    head = ["method", "erasures", "strengths", "preservation", *heads, "worst case", "spoiled", "clean"]
    marks = {
        (one["panel"], one["method"]): " ▲" if one["difference"] > 0 else " ▼"
        for one in matched["differences"]
        if one["p_holm"] < ALPHA
    }
    by_name = {one["method"]: one for one in matched["methods"]}
    rows = []
    for method in (one["method"] for one in analysis["methods"]):
        one = by_name.get(method)
        label = plain(method_words(method))
        if one is None or "rows" not in one:
            why = "no complete erasure yet"
            if one is not None:
                why = "no strength keeps that much"
                if one["reached"]:
                    why = f"keeps that much in {one['reached']} of {one['choices']} choices only"
            rows.append([label, str(len(one["seeds"]) if one else 0), why, *["—"] * (len(head) - 3)])
            continue
        told = [share(one["rows"].get(name)) + marks.get((name, method), "") for name in names]
        told += [share(one[WORST]) + marks.get((WORST, method), ""), share(one["corrupted"])]
        told.append(share(one[CLEAN]) + marks.get((CLEAN, method), ""))
        chosen = dict.fromkeys(strength_words(choice["strength"]) for choice in one["chosen"])
        rows.append([label, str(len(one["seeds"])), ", ".join(chosen), number(one["preservation"]), *told])
    return {"floor": f"{matched['floor']:.2f}", "head": head, "rows": rows}


def _areas(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """A row per method, a column per panel that has areas."""
    panels = [panel for panel in analysis["panels"] if panel["areas"]]
    rows = []
    for one in analysis["methods"]:
        found = [next((a for a in p["areas"] if a["method"] == one["method"]), None) for p in panels]
        tried = max((area["points"] for area in found if area), default=0)
        told = [f"{area['mean']:.2f} ({area['low']:.2f}–{area['high']:.2f})" if area else "—" for area in found]
        rows.append([plain(method_words(one["method"])), f"{tried} of {one['strengths']}", *told])
    return {"head": ["method", "strengths", *(plain(panel_title(p["panel"])) for p in panels)], "rows": rows}


def _points(analysis: Mapping[str, Any]) -> dict[str, Any]:
    names = [row["row"] for row in analysis["rows"]]
    fields = {one["method"]: one["field"] for one in analysis["methods"]}
    kept = list(dict.fromkeys(name for point in analysis["points"] for name in point["kept"]))
    head = ["method", "strength", "complete erasures", "preservation", *(plain(panel_title(name)) for name in names)]
    head += ["worst case", "spoiled", "clean", *(plain(name.replace("_", " ")) for name in kept)]
    rows = []
    for point in analysis["points"]:
        field = fields[point["method"]]
        strength = f"{plain(field)} {strength_words(point['strength'])}" if field else strength_words(None)
        told = [share(point["rows"][name]["success"] if name in point["rows"] else None) for name in names]
        told += [share(point[key]) for key in (WORST, "corrupted", CLEAN)]
        told += [share(point["kept"].get(name)) for name in kept]
        first = [plain(method_words(point["method"])), strength, str(len(point["complete_seeds"]))]
        rows.append([*first, number(point["preservation"]), *told])
    return {"head": head, "rows": rows}


# --- sentences ----------------------------------------------------------------------------------------


def _reading(panel: Mapping[str, Any], analysis: Mapping[str, Any]) -> Finding:
    """One paragraph on a panel: areas, the front, and the comparison at the middle floor."""
    heading = plain(panel_title(panel["panel"]))
    if not panel["reliable"]:
        return Finding(heading=heading, text="Without a sound positive control, nothing can be said here.")
    if not panel["areas"]:
        return Finding(heading=heading, text="No point has both its preservation and this yet.")
    reference = analysis["reference"]
    ranked = sorted(panel["areas"], key=lambda one: -one["mean"])
    order = [f"{plain(method_words(a['method']))} {a['mean']:.2f} ({a['low']:.2f}–{a['high']:.2f})" for a in ranked]
    said = [f"By area: {', '.join(order)}."]
    if panel["differences"]:
        apart = _apart(panel["differences"], lambda value: f"{value:+.2f}".replace("-", "−"))
        said.append(f"That of {plain(method_words(reference))} is {apart}.")
    front: dict[str, list[str]] = {}
    for point in panel["points"]:
        if point["on_front"]:
            front.setdefault(plain(method_words(point["method"])), []).append(strength_words(point["strength"]))
    on_it = [f"{name} at {', '.join(at)}" for name, at in front.items()]
    said.append(f"On the Pareto front: {'; '.join(on_it)}.")
    said += _at_floor(panel["panel"], analysis)
    return Finding(heading=heading, text=" ".join(said))


def _at_floor(panel: str, analysis: Mapping[str, Any]) -> list[str]:
    """What the comparison at the middle floor says of one panel."""
    if not analysis["matched"]:
        return []
    matched = analysis["matched"][len(analysis["matched"]) // 2]
    reference, floor = analysis["reference"], f"{matched['floor']:.2f}"
    ours = next((one for one in matched["methods"] if one["method"] == reference and "rows" in one), None)
    name = plain(method_words(reference))
    if all(one["method"] != reference for one in matched["methods"]):
        return []
    if ours is None:
        return [
            f"At a preservation of at least {floor} {name} cannot be compared: not all of its choices keep that much."
        ]
    value = ours[panel] if panel in (WORST, CLEAN) else ours["rows"].get(panel)
    if value is None:
        return []
    differences = [one for one in matched["differences"] if one["panel"] == panel]
    said = f"At a preservation of at least {floor} {name} has {share(value)}"
    said += f", which is {_apart(differences, lambda value: f'{points(value)} points')}." if differences else "."
    short = [
        plain(method_words(one["method"]))
        for one in matched["methods"]
        if "rows" not in one and one["method"] != reference
    ]
    return [said, *([f"Not all choices of {listed(short)} keep that much."] if short else [])]


def _apart(differences: Sequence[Mapping[str, Any]], told: Any) -> str:
    """ "above that of ESD (+0.20) and CA (+0.31) and not told apart from that of SPM (+0.01)" """
    clear = [one for one in differences if one["p_holm"] < ALPHA]
    parts = []
    for word, these in (
        ("above", [one for one in clear if one["difference"] > 0]),
        ("below", [one for one in clear if one["difference"] < 0]),
    ):
        if these:
            parts.append(f"{word} that of {_named(these, told)}")
    rest = [one for one in differences if one["p_holm"] >= ALPHA]
    if rest:
        parts.append(f"not told apart from that of {_named(rest, told)}")
    return listed(parts)


def _named(differences: Iterable[Mapping[str, Any]], told: Any) -> str:
    return listed([f"{plain(method_words(one['method']))} ({told(one['difference'])})" for one in differences])
