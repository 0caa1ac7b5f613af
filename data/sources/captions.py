"""From the texts that a source gives for a picture to the captions that are trained on.

All variants are made once, before training: each caption's embedding comes from the text encoder and is cached, so a
fresh shuffle at every step would have to load that encoder again and again. Which of a picture's captions a step trains
on is drawn by the loader.

The order of work: lines, tags, template, trigger. So the trigger stays in front of shuffled tags, and a template that
holds it already is left alone.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Captions:
    """What is done to the captions of a source (`dataset.captions`).

    Args:
        trigger: a word that every caption is to hold; "trigger, " is put in front of one that lacks it as a word.
        template: the caption goes where it says {caption}: "a photo of {caption}".
        split_lines: each line of a text is a caption of its own.
        shuffle_tags: so many orders of a caption's tags, which are parted by commas; 0 leaves them as they are.
        keep_tags: so many tags at the beginning stay where they are.
        allow_empty: an empty caption is meant, and trains with the empty prompt; else it counts as bad.
        seed: of the orders. They depend on it, the caption and nothing else.

    Raises ValueError, naming the key, for a value that cannot be or would do nothing.
    """

    trigger: str | None = None
    template: str | None = None
    split_lines: bool = False
    shuffle_tags: int = 0
    keep_tags: int = 0
    allow_empty: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("trigger", "template"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"dataset.captions.{key}={value!r} must be a text that is not empty, or null")
        for key in ("split_lines", "allow_empty"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"dataset.captions.{key}={getattr(self, key)!r} must be true or false")
        for key in ("shuffle_tags", "keep_tags", "seed"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"dataset.captions.{key}={value!r} must be a whole number from 0")
        if self.template is not None and "{caption}" not in self.template:
            raise ValueError(
                f"dataset.captions.template={self.template!r} must say {{caption}} where the caption goes; "
                "one text for all pictures is dataset.prompt"
            )
        if self.keep_tags and not self.shuffle_tags:
            raise ValueError(f"dataset.captions.keep_tags={self.keep_tags} does nothing without shuffle_tags")

    def prepare(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The captions of one picture, each once. ValueError, which says only the reason, if one is not allowed."""
        if self.split_lines:
            texts = [line for text in texts for line in text.splitlines() if line.strip()]
        texts = [text.strip() for text in texts] or [""]
        if not all(texts) and not self.allow_empty:
            raise ValueError(
                "has an empty caption: write one, or say that it is meant with dataset.captions.allow_empty=true"
            )
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise ValueError("has a caption with half of a character (a lone surrogate)")
        return tuple(dict.fromkeys(self._finish(order) for text in texts for order in self._orders(text)))

    def _orders(self, text: str) -> list[str]:
        """The caption with its tags in every order that is drawn."""
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        fixed, loose = tags[: self.keep_tags], tags[self.keep_tags :]
        if not self.shuffle_tags or len(loose) < 2:
            return [text]
        return [", ".join([*fixed, *self._shuffled(loose, text, number)]) for number in range(self.shuffle_tags)]

    def _shuffled(self, tags: list[str], text: str, number: int) -> list[str]:
        """By a hash for each tag, not a running generator: what is drawn for one caption is independent of others."""
        content = f"{self.seed} {number} {text}".encode()

        def place(index: int) -> bytes:
            return hashlib.sha256(f"{index} ".encode() + content).digest()

        return [tags[index] for index in sorted(range(len(tags)), key=place)]

    def _finish(self, text: str) -> str:
        if self.template is not None:
            text = self.template.replace("{caption}", text).strip()
        if self.trigger is not None and not re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", text):
            text = f"{self.trigger}, {text}" if text else self.trigger
        return text
