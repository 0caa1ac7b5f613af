"""Captions of drawings, and instructions that edit them.

Captions vary on purpose and include nonsense words: a base model that knows only one form of caption fails when a
prompt contains an unknown word, such as the trigger word of a LoRA.
"""

import random
import string
from dataclasses import replace

from data.synthetic.drawings import BACKGROUNDS, COLORS, NAMES, SHAPES, SIZES, Drawing, held_out

_LEADS = ("a drawing of", "a picture of", "an image of", "a card of")
_STYLES = ("ink style", "vintage style", "tarot style", "flat style", "woodcut style")
_KNOWN_WORDS = frozenset((*SHAPES, *COLORS, *BACKGROUNDS, *SIZES, "background", "the", "style", "with"))

# the first form of each kind is the canonical one
_EDIT_FORMS = {
    "color": "make it {new}; make the {shape} {new}; paint it {new}; paint the {shape} {new}; "
    "change its color to {new}; turn it {new}; a {new} {shape} instead",
    "background": "change the background to {new}; put it on a {new} background; make the background {new}; "
    "put the {shape} on a {new} background; on a {new} background; {new} background",
    "shape": "turn it into a {new}; replace the {shape} with a {new}; replace it with a {new}; "
    "turn the {shape} into a {new}; make it a {new}; change the {shape} to a {new}",
    "size": "make it {new}; make the {shape} {new}; draw it {new}; change its size to {new}",
}
EDITS = tuple(_EDIT_FORMS)


def with_article(words: str) -> str:
    """Return the words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def _nonsense(rng: random.Random) -> str:
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
        if word not in _KNOWN_WORDS:
            return word


def plain_caption(drawing: Drawing) -> str:
    """Return the usual form of caption: "a small red cup on a blue background"."""
    subject = with_article(f"{drawing.size} {drawing.color} {drawing.shape}")
    return f"{subject} on {with_article(drawing.background)} background"


def caption(drawing: Drawing, rng: random.Random) -> str:
    """Return a caption of at most 16 words: the usual form in 40 %, else a variation; nonsense words in 25 %.

    Variations omit parts, change the order and the articles, and add leading phrases, styles and nonsense, so that the
    model learns which words matter and ignores unknown ones.
    """
    if rng.random() < 0.4:
        return plain_caption(drawing)
    size_as_adjective = rng.random() < 0.85
    adjectives = [drawing.size] if rng.random() < 0.7 and size_as_adjective else []
    adjectives += [drawing.color] if rng.random() < 0.9 else []
    words = [*adjectives, drawing.shape]
    article = rng.choices(("a", "the", ""), (0.55, 0.25, 0.2))[0]
    nonsense = rng.choice(("lead", "word", "style")) if rng.random() < 0.42 else ""

    if nonsense == "word":  # before any word of the subject; the meaning must not depend on the place
        words.insert(rng.randrange(len(words)), _nonsense(rng))
    subject = " ".join(words)
    if article:
        subject = with_article(subject) if article == "a" else f"the {subject}"
    if nonsense == "lead":
        subject = f"{with_article(_nonsense(rng))} of {subject}"
    elif rng.random() < 0.3:
        subject = f"{rng.choice(_LEADS)} {subject}"

    background = f"on {with_article(drawing.background)} background"
    text = subject if size_as_adjective else f"{subject}, {drawing.size}"
    place = rng.choices(("after", "before", "listed", "left out"), (0.3, 0.2, 0.15, 0.35))[0]
    if place == "after":
        text = f"{text} {background}" if size_as_adjective else f"{text}, {background}"
    elif place == "before":
        text = f"{background}, {text}"
    elif place == "listed":
        text = f"{text}, {drawing.background} background"
    if nonsense == "style":
        text = f"{text}, {_nonsense(rng)} style"
    elif rng.random() < 0.2:
        text = f"{text}, {rng.choice(_STYLES)}"
    return text


def _instruction(form: str, drawing: Drawing, new: str) -> str:
    if new[0] in "aeiou":
        form = form.replace("a {new}", "an {new}")
    return form.format(shape=drawing.shape, new=new)


def plain_edit(drawing: Drawing, kind: str, new: str) -> tuple[str, Drawing]:
    """Return the canonical instruction that sets attribute `kind` (see EDITS) to `new`, and the resulting drawing."""
    if kind not in EDITS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(EDITS)}")
    if getattr(drawing, kind) == new:
        raise ValueError(f"new={new!r} is the {kind} of the drawing already: an edit must change something")
    return _instruction(_EDIT_FORMS[kind].split("; ")[0], drawing, new), replace(drawing, **{kind: new})


def edit(drawing: Drawing, rng: random.Random) -> tuple[str, Drawing]:
    """Return a random instruction and the resulting drawing, which differs from `drawing` in one attribute.

    If a drawing is not held out, neither is the result: training on edits must not show held-out images.
    """
    while True:
        kind = rng.choices(EDITS, (0.35, 0.25, 0.25, 0.15))[0]
        new = rng.choice([name for name in NAMES[kind] if name != getattr(drawing, kind)])
        result = replace(drawing, **{kind: new})
        if held_out(drawing) or not held_out(result):
            return _instruction(rng.choice(_EDIT_FORMS[kind].split("; ")), drawing, new), result
