"""data.sources.captions: trigger, template, several captions, shuffled tags; what is empty; what cannot be."""

import itertools

import pytest

from data.sources.captions import Captions


def prepared(*texts: str, **settings: object) -> list[str]:
    return list(Captions(**settings).prepare(texts))  # type: ignore[arg-type]


def test_captions_are_stripped_and_given_once() -> None:
    assert prepared(" a cat ", "a cat\n", "a dog") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red cup", "trtcrd, a red cup"),
        ("a trtcrd of a cup", "a trtcrd of a cup"),
        ("trtcrd", "trtcrd"),
        ("trtcrds of cups", "trtcrd, trtcrds of cups"),  # another word
        ("TRTCRD cup", "trtcrd, TRTCRD cup"),  # other tokens
        ("(trtcrd)", "(trtcrd)"),
    ],
)
def test_the_trigger_is_put_in_front_where_it_is_missing(text: str, expected: str) -> None:
    assert prepared(text, trigger="trtcrd") == [expected]


def test_a_trigger_may_have_any_characters() -> None:
    assert prepared("a cup", "a c++ cup", trigger="c++") == ["c++, a cup", "a c++ cup"]


def test_the_template_holds_the_caption_and_may_hold_the_trigger() -> None:
    assert prepared("cup", template="a photo of {caption}, :{") == ["a photo of cup, :{"]
    assert prepared("cup", template="trtcrd {caption}", trigger="trtcrd") == ["trtcrd cup"]
    assert prepared("cup", template="a {caption}", trigger="trtcrd") == ["trtcrd, a cup"]


@pytest.mark.parametrize("other", ["{trigger}", "{}", "{Caption}", "{{caption}}"])
def test_a_placeholder_other_than_the_caption_is_refused(other: str) -> None:
    with pytest.raises(ValueError, match=r"dataset\.captions\.template=.*\{caption\}\..*dataset\.captions\.trigger"):
        Captions(template=f"{{caption}} {other}", trigger="trtcrd")


def test_lines_are_captions_only_on_request() -> None:
    assert prepared("one\n\n two \n") == ["one\n\n two"]
    assert prepared("one\n\n two \n", split_lines=True) == ["one", "two"]


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    text = "trtcrd,a, b ,c,d,e"
    found = prepared(text, shuffle_tags=20, keep_tags=2)
    assert len(found) > 10
    for caption in found:
        tags = caption.split(", ")
        assert tags[:2] == ["trtcrd", "a"]
        assert sorted(tags[2:]) == ["b", "c", "d", "e"]
    assert prepared(text, shuffle_tags=20, keep_tags=2) == found
    assert prepared(text, shuffle_tags=5, keep_tags=2) == list(dict.fromkeys(found))[:5]
    assert prepared(text, shuffle_tags=20, keep_tags=2, seed=1) != found


def test_every_order_of_tags_is_drawn_about_equally_often() -> None:
    texts = [f"a, b, c{number}" for number in range(600)]
    drawn = [prepared(text, shuffle_tags=1)[0] for text in texts]
    orders = [tuple(tag[0] for tag in caption.split(", ")) for caption in drawn]
    for order in itertools.permutations("abc"):
        assert 70 <= orders.count(order) <= 130


def test_orders_leave_out_their_share_of_the_tags_each_about_equally_often() -> None:
    text = "t, " + ", ".join("abcdefgh")
    found = prepared(text, shuffle_tags=1000, keep_tags=1, tag_dropout=0.25)
    assert all(caption.startswith("t") for caption in found)
    counts = [sum(tag in caption.split(", ") for caption in found) / len(found) for tag in "abcdefgh"]
    assert all(0.7 <= count <= 0.8 for count in counts)
    plain = prepared(text, shuffle_tags=1000, keep_tags=1)
    kept = [
        [tag for tag in order.split(", ") if tag in drawn.split(", ")]
        for order, drawn in zip(plain[:3], found, strict=False)
    ]
    assert [", ".join(order) for order in kept[:3]] == found[:3]  # the orders are those without dropout


def test_one_tag_is_left_where_dropout_would_leave_none() -> None:
    assert set(prepared("a, b", shuffle_tags=50, tag_dropout=0.9)) == {"a", "b"}
    assert set(prepared("t, a", shuffle_tags=50, keep_tags=1, tag_dropout=0.5)) == {"t", "t, a"}
    assert prepared("a", shuffle_tags=50, tag_dropout=0.9) == ["a"]


def test_one_tag_is_left_as_it_is_and_never_lost() -> None:
    assert prepared("a cat", shuffle_tags=3) == ["a cat"]
    assert prepared("a, b", shuffle_tags=3, keep_tags=5) == ["a, b"]


def test_the_trigger_stays_in_front_of_shuffled_tags() -> None:
    assert all(caption.startswith("t, ") for caption in prepared("a, b, c", trigger="t", shuffle_tags=8))


@pytest.mark.parametrize("texts", [("",), (" \n",), ("a", ""), ()])
def test_an_empty_caption_is_refused_unless_it_is_meant(texts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"empty.*dataset\.captions\.allow_empty=true"):
        prepared(*texts)
    assert prepared(*texts, allow_empty=True)[-1] == ""


def test_an_empty_caption_that_is_meant_gets_the_trigger() -> None:
    assert prepared("", allow_empty=True, trigger="trtcrd") == ["trtcrd"]


def test_a_line_ends_where_a_text_file_ends_it_and_not_at_characters_of_the_text() -> None:
    text = "one\u2028still one\r\ntwo\u0085still two\rthree\n\n"
    assert prepared(text, split_lines=True) == ["one\u2028still one", "two\u0085still two", "three"]


def test_the_captions_of_an_image_have_a_bound() -> None:
    with pytest.raises(ValueError, match=r"20000 captions.*10000"):
        prepared("x\n" * 20_000, split_lines=True)
    with pytest.raises(ValueError, match=r"1001 captions in 10 orders.*10000"):
        prepared(*["a, b, c"] * 1001, shuffle_tags=10)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match=r"character|Unicode|surrogate"):
        prepared("a \ud800")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": ""}, r"dataset\.captions\.trigger=''"),
        ({"trigger": 3}, r"dataset\.captions\.trigger=3\b"),
        ({"template": "a photo"}, r"template='a photo'.*\{caption\}"),
        ({"shuffle_tags": -1}, r"shuffle_tags=-1\b"),
        ({"shuffle_tags": 1_000_000_000}, r"shuffle_tags=1000000000\b.*1000\b"),
        ({"shuffle_tags": True}, r"shuffle_tags=True\b"),
        ({"keep_tags": 1}, "keep_tags=1.*shuffle_tags"),
        ({"tag_dropout": 0.1}, r"tag_dropout=0\.1.*shuffle_tags"),
        ({"tag_dropout": 1, "shuffle_tags": 2}, "tag_dropout=1 must"),
        ({"tag_dropout": True, "shuffle_tags": 2}, "tag_dropout=True must"),
        ({"tag_dropout": "x", "shuffle_tags": 2}, "tag_dropout='x' must"),
        ({"split_lines": "yes"}, "split_lines='yes'"),
        ({"allow_empty": None}, "allow_empty=None"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Captions(**settings)
