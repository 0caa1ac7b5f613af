"""Pairs of a chosen and a rejected image for one caption, to train a preference or a slider."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.checks import check_text, check_texts
from data.sources.base import Sample
from data.sources.captions import Captions
from data.sources.folders import Pairs, existing_folder


class Preference(Pairs):
    """Images that are preferred over others: `chosen/x.png`, `rejected/x.png`, and the caption in `chosen/x.txt`.

    Args:
        chosen_folder: Folder of the preferred images, including subfolders.
        rejected_folder: Folder of the others, with images of the same names and sizes in any format.
        reference_folders: One folder for each image that both are edits of, likewise with images of the same names.
        prompt: One caption for all pairs, instead of the `.txt` files.
        mask: "alpha" of the chosen images, or a folder of images with the same names; for both images of a pair.
        captions, first_frame, max_bad, loss_weight: As in `Source`.

    Raises ValueError for a folder that does not exist, and BadData for pairs that cannot be used.
    """

    _hint = ""  # a pair has all of its images

    def __init__(
        self,
        path: str | Path,
        chosen_folder: str = "chosen",
        rejected_folder: str = "rejected",
        reference_folders: Sequence[str] = (),
        prompt: str | None = None,
        mask: str | None = None,
        captions: Captions | None = None,
        first_frame: bool = False,
        max_bad: int = 0,
        loss_weight: float = 1.0,
    ) -> None:
        folder = existing_folder("path", path)
        for key, name in (("chosen_folder", chosen_folder), ("rejected_folder", rejected_folder)):
            existing_folder(key, folder / check_text(f"dataset.{key}", name))
        references = check_texts("dataset.reference_folders", reference_folders)
        settings = prompt, False, mask, captions, first_frame, max_bad, loss_weight
        super().__init__(path, chosen_folder, [*references, rejected_folder], *settings)

    def _prepared(self, sample: Sample) -> Sample:
        """Return the sample with the last of the images that `Pairs` found for it as its rejected image."""
        *references, rejected = sample.references
        prepared = super()._prepared(replace(sample, references=tuple(references), rejected=rejected))
        if rejected.is_same_file(sample.target):
            raise ValueError(
                f"is its own rejected image, {rejected.name}, so there is no preference: name another image"
            )
        if rejected.size != sample.target.size:
            sizes = " x ".join(map(str, rejected.size)), " x ".join(map(str, sample.target.size))
            raise ValueError(f"has {sizes[1]} pixels, and the rejected {rejected.name} has {sizes[0]}: crop them alike")
        return prepared
