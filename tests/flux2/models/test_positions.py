"""flux2.models.positions: the order of tokens and their positions are those of Flux2Pipeline."""

import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from flux2.models.positions import (
    from_tokens,
    image_positions,
    positions_with_references,
    text_positions,
    to_tokens,
    with_references,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_image_positions_run_row_by_row_at_time_zero() -> None:
    assert image_positions(2, 3).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 2, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 2, 0],
    ]
    assert torch.equal(image_positions(5, 3), Flux2Pipeline._prepare_latent_ids(draw(1, 4, 5, 3))[0])


def test_text_positions_count_along_the_last_axis() -> None:
    assert text_positions(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert torch.equal(text_positions(7), Flux2Pipeline._prepare_text_ids(draw(1, 7, 2))[0])


def test_reference_i_stands_at_time_ten_plus_ten_i_on_its_own_grid() -> None:
    latents, references = draw(2, 4, 3, 2), [draw(2, 4, 2, 5), draw(2, 4, 1, 1), draw(2, 4, 4, 1)]
    positions = positions_with_references(latents, references)
    wanted = Flux2Pipeline._prepare_image_ids([reference[:1] for reference in references])[0]
    assert positions[:, 0].unique_consecutive().tolist() == [0, 10, 20, 30]
    assert torch.equal(positions[:6], image_positions(3, 2))
    assert torch.equal(positions[6:], wanted)
    assert positions[6 + 4].tolist() == [10, 0, 4, 0]


def test_tokens_run_row_by_row_and_come_back() -> None:
    latents = draw(2, 5, 3, 4)
    tokens = to_tokens(latents)
    assert torch.equal(tokens, Flux2Pipeline._pack_latents(latents))
    assert torch.equal(tokens[1, 1 * 4 + 2], latents[1, :, 1, 2])
    assert torch.equal(from_tokens(tokens, 3, 4), latents)


def test_references_follow_the_image_in_its_dtype() -> None:
    latents, references = draw(2, 5, 3, 4), [draw(2, 5, 2, 2).double(), draw(2, 5, 1, 3)]
    tokens = with_references(to_tokens(latents), references)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[:, :12], to_tokens(latents))
    assert torch.equal(tokens[:, 12:16], to_tokens(references[0]).float())
    assert torch.equal(tokens[:, 16:], to_tokens(references[1]))
    assert torch.equal(with_references(to_tokens(latents)), to_tokens(latents))


@pytest.mark.parametrize("sizes", [[(2, 5)], [(2, 5), (1, 1), (4, 1)]], ids=["1 reference", "3 references"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_sequence_is_the_one_that_the_pipeline_makes(batch: int, sizes: list[tuple[int, int]]) -> None:
    """Each row against what Flux2Pipeline would feed its transformer for that picture alone."""
    noisy = draw(batch, 4, 3, 2)
    references = [draw(batch, 4, *size, seed=1 + i) for i, size in enumerate(sizes)]
    tokens = with_references(to_tokens(noisy), references)
    positions = positions_with_references(noisy, references)
    for row in range(batch):
        own = [reference[row : row + 1] for reference in references]
        packed = [Flux2Pipeline._pack_latents(grid) for grid in [noisy[row : row + 1], *own]]
        ids = [Flux2Pipeline._prepare_latent_ids(noisy[row : row + 1]), Flux2Pipeline._prepare_image_ids(own)]
        assert torch.equal(tokens[row : row + 1], torch.cat(packed, dim=1))
        assert torch.equal(positions[None], torch.cat(ids, dim=1))


def test_tokens_are_put_back_where_the_pipeline_puts_them_by_their_positions() -> None:
    tokens = draw(2, 5 * 3, 4)
    ids = image_positions(5, 3).expand(2, -1, -1)
    assert torch.equal(from_tokens(tokens, 5, 3), Flux2Pipeline._unpack_latents_with_ids(tokens, ids))
