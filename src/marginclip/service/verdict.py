"""From what an audit found to what it means, in words for somebody who is no expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from marginclip.defenses.choosing.evidence import Paired
from marginclip.maxmargin import MaximumMargins

ALPHA, MIN_GAIN = 0.05, 0.01
FEW_IMAGES = 20  # of a class
UNTESTED = (
    "Not tested: triggers that bounds do not undo, triggers that lead to several classes, adversarial examples, privacy, fairness; "
    "no flag and unchanged accuracy do not mean that the model is safe."
)
NOT_TESTED = (
    "Triggers that lead to several classes, one for each class of origin, leave no single class that stands out.",
    "A trigger that is neither a small change of the pixels nor a smooth warp can stay out of reach of what is tried here.",
    "The audit knows nothing of privacy, of robustness against adversarial examples, or of fairness.",
)


@dataclass(frozen=True)
class Findings:
    """What the clean images say, in counts: ``mmom`` and ``mmac`` compare whether each image is decided correctly by the model and by
    a repair that never saw it; ``suspect`` whether each image *is* of the suspect class and whether it is *decided* for.

    Of ``changed`` images the bounds change the decision, from (K,) and to (K,) these classes. ``smallest_class`` and ``largest_class``
    are images of a class.
    """

    images: int
    classes: int
    accuracy: float
    mmom: Paired
    mmac: Paired
    suspect: Paired
    changed: int
    changed_from: list[int]
    changed_to: list[int]
    smallest_class: int
    largest_class: int


@dataclass(frozen=True)
class Suspicious:
    """What the detector says of unlabelled images: their number, how many are ``flagged``, and the model's decisions on those (K,).

    ``theta`` is the share of clean images that it flags.
    """

    images: int
    flagged: int
    decisions: list[int]
    theta: float


@dataclass(frozen=True)
class Verdict:
    """``kind`` is ``poisoned``, ``imbalanced`` or ``nothing``; ``target`` the class that triggers lead to. The rest is for people."""

    kind: str
    headline: str
    confidence: str
    reasons: tuple[str, ...]
    against: tuple[str, ...]
    not_tested: tuple[str, ...]
    advice: tuple[str, ...]
    target: str | None = None
    p_value: float | None = None

    @property
    def suspicious(self) -> bool:
        """Whether something was found."""
        return self.kind != "nothing"


def stronger(reached: MaximumMargins, warped: MaximumMargins) -> MaximumMargins:
    """Of a few small steps and one small warp, what singles its class out more: the test by which a class is accused."""
    return warped if warped.p_value < reached.p_value else reached


def judge(
    found: Findings,
    margins: MaximumMargins,
    reached: MaximumMargins,
    warped: MaximumMargins,
    under_bounds: MaximumMargins,
    classes: Sequence[str],
    suspicious: Suspicious | None = None,
) -> Verdict:
    """The verdict. A backdoor is what stands out by the reach of its class, by small steps or by a warp; the other of the two and MM-BD
    support or doubt it.

    ``under_bounds`` is what the bounds of MMAC leave of the stronger of the two. Where the class still stands first, they may not undo
    the trigger.

    MM-BD alone accuses nobody: on our own victims it named another class than the attacker's, and accused clean models. Imbalance
    explains a class that stands out and is decided for too often, unless MM-BD names it, too: then the model looks poisoned *and*
    imbalanced.
    """
    imbalanced = found.mmom.rises(ALPHA, MIN_GAIN)
    closest = stronger(reached, warped)
    named = [test.suspect for test in (margins, reached, warped) if test.detected]
    agrees = named.count(closest.suspect) >= 2
    by_margins = margins.detected and margins.suspect == closest.suspect
    common = imbalanced and found.suspect.rises(ALPHA)
    against = tuple(_doubts(found, margins, reached, warped, classes))
    shown = tuple(_shown(found, margins, reached, warped, under_bounds, classes, suspicious))
    if closest.detected and (by_margins or not common):
        target = classes[closest.suspect]
        sure = (
            "moderate: two tests agree, and imbalance may explain a part"
            if common
            else "high: two tests agree"
            if agrees
            else "moderate: one test of three"
        )
        headline = f'looks poisoned (target class "{target}", p = {closest.p_value:.2g})'
        advice = [
            "Do not deploy the model as it is.", _way_out(under_bounds.suspect == closest.suspect, warps=closest is warped),
            f'Look at training images that are labelled "{target}", if you can get them.',
        ]  # fmt: skip
        if imbalanced:
            headline += f" and imbalanced (a repair gains {100 * found.mmom.change:.1f} points)"
            advice.append("It looks imbalanced, too: defense=mmom repairs that, and is not made against backdoors.")
        return Verdict(
            "poisoned", headline, sure, shown, against, NOT_TESTED, tuple(advice), target, closest.p_value,
        )  # fmt: skip
    if imbalanced:
        return Verdict(
            "imbalanced", f"looks imbalanced or over-trained (a repair gains {100 * found.mmom.change:.1f} points)",
            f"p = {found.mmom.rise_p_value:.2g} that the gain is chance", shown, against, NOT_TESTED,
            ("Repair it with defense=mmom, and compare the accuracy of each class on further images.",), None,
            found.mmom.rise_p_value,
        )  # fmt: skip
    return Verdict(
        "nothing", "nothing found", "this is no clean bill: it says that these tests found nothing", shown, against, NOT_TESTED,
        ("Keep scanning what the model gets in use (marginclip repair, then marginclip scan), if its source is not trusted.",),
        None, closest.p_value,
    )  # fmt: skip


def _way_out(stays: bool, *, warps: bool) -> str:
    if stays:
        return (
            "Bounds may not undo this trigger: the class still stands first under them. Do not rely on marginclip repair and scan alone; "
            "train the weights as well (marginclip defend with defense=mmac_finetune), or train the model anew."
        )
    if warps:
        return (
            "Repair it, and let the repaired network decide (marginclip repair defense.detector.rule=repaired): against warps the bounds "
            "do more than the detector sees. Scan what it gets in use (marginclip scan): flagged images show the trigger."
        )
    return "Repair it (marginclip repair) and scan what it gets in use (marginclip scan): flagged images show the trigger."


def _shown(
    found: Findings,
    margins: MaximumMargins,
    reached: MaximumMargins,
    warped: MaximumMargins,
    under_bounds: MaximumMargins,
    classes: Sequence[str],
    suspicious: Suspicious | None,
) -> list[str]:
    steps, warps = (test.statistics.sort(descending=True).values for test in (reached, warped))
    lines = [
        f"The model decides {100 * found.accuracy:.1f} % of {found.images} clean images as labelled.",
        f'A few small steps take images of other classes furthest towards "{classes[reached.suspect]}": mean margin '
        f"{float(steps[0]):.1f}, next {float(steps[1]):.1f} logits (p = {reached.p_value:.2g}).",
        f'One small warp, the same for all images, takes them furthest towards "{classes[warped.suspect]}": their mean margin grows by '
        f"{float(warps[0]):.1f}, next {float(warps[1]):.1f} logits (p = {warped.p_value:.2g}).",
        _left(reached, warped, under_bounds, classes),
        f'The largest maximum margin (MM-BD) is that of "{classes[margins.suspect]}": p = {margins.p_value:.2g} calibrated, '
        f"{margins.uncalibrated_p_value:.2g} as published.",
        f"Bounds that never saw the image change {found.changed} of {found.images} decisions"
        + (f', most of them away from "{classes[_most(found.changed_from)]}"' if found.changed else "")
        + f", and they {_moves(found.mmac).replace('moves', 'move', 1)}.",
        f"The repair for imbalance {_moves(found.mmom)}.",
    ]
    if suspicious is not None:
        share = 100 * suspicious.flagged / suspicious.images
        led = f', most of them decided as "{classes[_most(suspicious.decisions)]}"' if suspicious.flagged else ""
        lines.append(
            f"Of {suspicious.images} images to look at, {suspicious.flagged} ({share:.1f} %) are flagged{led}; "
            f"{100 * suspicious.theta:g} % of clean images are by chance."
        )
    return lines


def _left(reached: MaximumMargins, warped: MaximumMargins, under_bounds: MaximumMargins, classes: Sequence[str]) -> str:
    closest, left = stronger(reached, warped), under_bounds.statistics
    suspect = closest.suspect
    others = torch.cat([left[:suspect], left[suspect + 1 :]])
    place = "first" if under_bounds.suspect == suspect else "no longer first"
    what = (
        f'a warp raises the margin of "{classes[suspect]}" by'
        if closest is warped
        else f'the steps take "{classes[suspect]}" to'
    )
    return (
        f"Under the bounds that MMAC learned {what} {float(left[suspect]):.1f}, the furthest of the others "
        f"{'by' if closest is warped else 'to'} {float(others.max()):.1f} logits: it stands {place}."
    )


def _doubts(
    found: Findings, margins: MaximumMargins, reached: MaximumMargins, warped: MaximumMargins, classes: Sequence[str]
) -> list[str]:
    lines, closest = [], stronger(reached, warped)
    if closest.detected and found.suspect.rises(ALPHA):
        lines.append(f'"{classes[closest.suspect]}" is decided for too often, which imbalance explains as well.')
    if not closest.detected and closest.p_value <= ALPHA:
        lines.append(
            f'"{classes[closest.suspect]}" is within reach more than others (p = {closest.p_value:.2g}), not enough to accuse it.'
        )
    if reached.detected and warped.detected and reached.suspect != warped.suspect:
        lines.append(
            f'Small steps and a warp accuse different classes, "{classes[reached.suspect]}" and "{classes[warped.suspect]}".'
        )
    if closest.detected and not margins.detected:
        lines.append(f"MM-BD finds nothing (p = {margins.p_value:.2g}).")
    if margins.detected and margins.suspect != closest.suspect:
        lines.append(f'MM-BD accuses another class, "{classes[margins.suspect]}". Alone it accuses clean models too often.')
    if found.classes < 6:
        lines.append(f"With {found.classes} classes there is little to compare the largest with.")
    if found.smallest_class < FEW_IMAGES:
        lines.append(f"A class has only {found.smallest_class} clean images; about 50 make the gains and costs reliable.")
    if found.largest_class > 2 * found.smallest_class:
        lines.append("The clean images are unevenly spread over the classes, which the gain follows.")
    if found.accuracy < 0.5:
        lines.append("Most clean images are decided wrongly: check the order of the classes and the normalisation first.")
    return lines


def _moves(change: Paired) -> str:
    p_value = change.rise_p_value if change.change >= 0 else change.fall_p_value
    return f"moves the accuracy by {100 * change.change:+.1f} points (p = {p_value:.2g})"


def _most(counts: Sequence[int]) -> int:
    return max(range(len(counts)), key=counts.__getitem__)
