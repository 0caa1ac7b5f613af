"""Processing of captions, from the texts of a source to the captions that are trained on.

All variants are made once, before training: each caption's embedding comes from the text encoder and is cached, so a
new shuffle at every step would need that encoder in memory. The loader draws which caption of an image a step uses.

The order is lines, tags, template, trigger. So the trigger stays in front of shuffled tags, and is not added to a
template that contains it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.checks import check_flag, check_int

MOST_CHARACTERS = 100_000  # of a caption; the text encoders read 512 tokens
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
MOST_ORDERS = 1000
MOST_CAPTIONS = 10_000  # of an image


@dataclass(frozen=True)
class Captions:
    """Settings for the captions of a source (`dataset.captions`).

    Raises ValueError, naming the key, for an invalid value and for one that would have no effect.
    """

    trigger: str | None = None  # word that every caption must contain; "trigger, " is put in front of one without it
    template: str | None = None  # text in which {caption} is replaced by the caption: "a photo of {caption}"
    split_lines: bool = False  # use each line of a text as a separate caption
    shuffle_tags: int = 0  # number of orders of a caption's comma-separated tags; 0 keeps the tags as they are
    keep_tags: int = 0  # number of tags at the beginning that stay in place
    tag_dropout: float = 0.0  # share of the other tags that each order leaves out
    allow_empty: bool = False  # train an empty caption with the empty prompt; otherwise it counts as bad
    seed: int = 0  # of the orders, which depend only on it and the caption

    def __post_init__(self) -> None:
        for key in ("trigger", "template"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"dataset.captions.{key}={value!r} must be a string that is not empty, or null")
        for key in ("split_lines", "allow_empty"):
            check_flag(f"dataset.captions.{key}", getattr(self, key))
        check_int("dataset.captions.shuffle_tags", self.shuffle_tags, 0, MOST_ORDERS)
        for key in ("keep_tags", "seed"):
            check_int(f"dataset.captions.{key}", getattr(self, key), 0)
        if self.template is not None and "{caption}" not in self.template:
            raise ValueError(
                f"dataset.captions.template={self.template!r} must contain {{caption}}. For one text for all images "
                "set dataset.prompt"
            )
        if self.template is not None and (others := PLACEHOLDER.findall(self.template.replace("{caption}", ""))):
            raise ValueError(
                f"dataset.captions.template={self.template!r} has {', '.join(others)}, and the only placeholder is "
                "{caption}. Write the text itself; for a trigger word set dataset.captions.trigger"
            )
        dropout = self.tag_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dataset.captions.tag_dropout={dropout!r} must be a number from 0, below 1")
        for key in ("keep_tags", "tag_dropout"):
            if (value := getattr(self, key)) and not self.shuffle_tags:
                raise ValueError(
                    f"dataset.captions.{key}={value} has no effect without shuffle_tags, the number of orders"
                )

    def prepare(self, texts: Sequence[str]) -> tuple[str, ...]:
        """Return the distinct captions of one image. Raise ValueError with the bare reason if one is not allowed."""
        if self.split_lines:
            # not `splitlines`, which also ends a line at characters that are part of texts, such as U+2028
            texts = [line for text in texts for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        texts = [text.strip() for text in texts] or [""]
        if not all(texts) and not self.allow_empty:
            raise ValueError("has an empty caption: write one, or allow it with dataset.captions.allow_empty=true")
        if max(map(len, texts)) > MOST_CHARACTERS:
            raise ValueError(
                f"has a caption of {max(map(len, texts))} characters: at most {MOST_CHARACTERS} are allowed"
            )
        if len(texts) * max(self.shuffle_tags, 1) > MOST_CAPTIONS:
            orders = f" in {self.shuffle_tags} orders" if self.shuffle_tags else ""
            raise ValueError(f"has {len(texts)} captions{orders}: at most {MOST_CAPTIONS} are allowed")
        if "\0" in (together := "".join(texts)):
            raise ValueError("has a caption with NUL characters, as text in UTF-16 has: save it as UTF-8")
        try:
            together.encode()
        except UnicodeEncodeError as error:
            raise ValueError("has a caption that contains a lone surrogate") from error
        if not self.shuffle_tags and self.template is None and self.trigger is None:
            return tuple(dict.fromkeys(texts))
        return tuple(dict.fromkeys(self._finish(order) for text in texts for order in self._orders(text)))

    def _orders(self, text: str) -> list[str]:
        """Return the caption with its tags in every order that is drawn."""
        if not self.shuffle_tags:
            return [text]
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        fixed, loose = tags[: self.keep_tags], tags[self.keep_tags :]
        if len(loose) < (1 if self.tag_dropout else 2):
            return [text]
        orders = ([*fixed, *self._shuffled(loose, text, number)] for number in range(self.shuffle_tags))
        return [", ".join(order or loose[:1]) for order in orders]

    def _shuffled(self, tags: list[str], text: str, number: int) -> list[str]:
        """Order the tags by a hash of each, not by a running generator, so that captions do not affect each other.

        Its last bytes decide which are left out.
        """
        content, least = f"{self.seed} {number} {text}", self.tag_dropout * 2**32
        ranks = [hashlib.sha256(f"{index} {content}".encode()).digest() for index in range(len(tags))]
        ordered = sorted(zip(ranks, tags, strict=True))
        return [tag for rank, tag in ordered if int.from_bytes(rank[-4:], "big") >= least]

    def _finish(self, text: str) -> str:
        if self.template is not None:
            text = self.template.replace("{caption}", text).strip()
        return text if self.trigger is None else with_trigger(text, self.trigger)


def with_trigger(text: str, trigger: str) -> str:
    """Return a caption with the trigger word in front, unless it has it already, as a word of its own."""
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
        return text
    return f"{trigger}, {text}" if text else trigger
