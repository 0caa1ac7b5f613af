"""The page Compare: the same prompts and seeds side by side, and a blind choice that counts."""

import json
import random
import re
import threading
from html import unescape
from io import BytesIO

import pytest
from PIL import Image
from run_folders import PROMPTS, color_of, logged_run, write_evaluation, write_grid
from studio_helpers import PYTHON, words

from train.evaluation.results import read_evaluation
from train.pages import choices, compare
from train.pages.choices import Comparison, ShownPair
from train.pages.queue import ROOT

pytest_plugins = ("studio_helpers",)

EVALUATE = str(ROOT / "train/evaluate.py")
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


@pytest.fixture
def page(studio_page):
    return studio_page()


@pytest.fixture
def two(page):
    """Two runs with sample grids; the first has an evaluation."""
    folder = page.known.workspace.outputs / "cards"
    first = logged_run(folder / "a", 0, 10, 20)
    write_evaluation(first, {"base": RED, "step 10": GREEN, "step 20": BLUE})
    return first, logged_run(folder / "b", 0, 10, loss=1.5, optimizer={"lr": 0.01})


def shown(page, *of, status=200):
    answer = page.get("/compare", params={"of": list(of)})
    assert answer.status_code == status
    return answer.text


def sides(text):
    """The addresses of each figure's pictures, by its caption."""
    found = re.findall(r'<figure class="side"><figcaption>(.*?)</figcaption>(.*?)</figure>', text, re.DOTALL)
    return {unescape(label): [unescape(one) for one in re.findall(r'src="([^"]*)"', part)] for label, part in found}


def pixel(page, address):
    answer = page.get(address)
    assert answer.headers["content-type"] == "image/png"
    return Image.open(BytesIO(answer.content)).convert("RGB").getpixel((20, 20))


def test_the_chooser_lists_what_each_run_has(page, two):
    text = shown(page)
    assert re.findall(r'name="of" value="[^"]*/a@([^"]*)"', text) == ["base", "step 10", "step 20"]
    assert re.findall(r'name="of" value="[^"]*/b@([^"]*)"', text) == ["base", "step 10"]
    assert "Choose at least two" in shown(page, f"{two[0]}@step 10")
    assert "Pictures of the same" not in shown(page, f"{two[0]}@step 10", f"{two[0]}@step 10")


def test_a_run_opens_with_its_base_the_recommended_and_the_last(page, two):
    answer = page.get("/compare", params={"run": str(two[0])})
    assert answer.status_code == 303
    answer = page.get(answer.headers["location"])
    assert re.findall(r'value="[^"]*/a@([^"]*)" checked', answer.text) == ["base", "step 20"]


def test_pictures_of_one_prompt_and_seed_stand_side_by_side(page, two):
    found = sides(shown(page, f"{two[0]}@step 10", f"{two[0]}@step 20", f"{two[1]}@step 10"))
    assert list(found) == [
        *(f"{prompt} (seed {3 + i}, sample grid)" for i, prompt in enumerate(PROMPTS)),
        *(f"{prompt} (seed {seed}, evaluation)" for prompt in PROMPTS for seed in (0, 1)),
    ]
    colors = [pixel(page, address) for address in found["a blue fox (seed 4, sample grid)"]]
    assert colors == [color_of(10, 1), color_of(20, 1), color_of(10, 1)]
    assert [pixel(page, one) for one in found["a red cup (seed 1, evaluation)"]] == [GREEN, BLUE]  # the other has none


def test_other_prompts_and_other_seeds_are_not_the_same(page, two):
    other = logged_run(two[0].with_name("c"), 0, 10, sample={"prompts": PROMPTS, "seed": 4})
    assert sides(shown(page, f"{two[1]}@step 10", f"{other}@step 10")) == {}
    write_grid(two[1], 20, ["a red cup", "another"])
    found = sides(shown(page, f"{two[0]}@step 20", f"{two[1]}@step 20"))
    assert list(found) == ["a red cup (seed 3, sample grid)"]


def test_losses_settings_and_recommendations_of_several_runs_are_shown(page, two):
    text = shown(page, f"{two[0]}@step 10", f"{two[1]}@step 10")
    charts = [json.loads(unescape(data)) for data in re.findall("data-chart='([^']*)'", text)]
    assert [one["name"] for one in charts[1]["series"]] == ["cards/a, validation", "cards/b, validation"]
    assert [one["values"][0] for one in charts[1]["series"]] == [1.65, 2.15]
    assert "optimizer.lr 0.01" in words(text)
    assert words(text).count("Recommended") == 2
    one = shown(page, f"{two[0]}@step 10", f"{two[0]}@step 20")
    assert "Settings that differ" not in one
    assert len(re.findall("data-chart='", one)) == 2


def test_strengths_are_a_slider_if_they_were_drawn_else_the_command_that_draws_them(page, two):
    text = shown(page, f"{two[0]}@step 10", f"{two[1]}@step 10")
    part = text.partition("Strength of step 20, cards/a")[2]
    assert re.findall(r'data-name="([^"]*)"', part) == ["x 0", "x 1"] * 2
    first = unescape(re.findall(r'src="([^"]*)"', part)[0])
    assert pixel(page, first) == RED
    assert "It was not drawn at several strengths yet" in part
    assert f"python {EVALUATE} run=outputs/cards/b 'seeds=[0,1]'" in words(text)
    (two[0] / "evaluation" / "evaluation.json").write_text('{"rows": 1}')
    assert "is not the file of an evaluation" in shown(page, f"{two[0]}@step 10", f"{two[1]}@step 10")


def test_missing_pictures_are_drawn_by_the_queue_with_the_same_prompts(page, two, monkeypatch):
    monkeypatch.setattr(page.known.queue, "start_next", lambda: None)
    other = logged_run(two[0].with_name("c"), 0, 10, sample={"prompts": ['a "b"'], "seed": 4}, device="cuda:1")
    page.submit("/compare/evaluate", of=[f"{two[0]}@step 10", f"{two[0]}@step 20", f"{other}@step 10"], seeds=3)
    second, first = page.known.queue.jobs()
    assert first.command == [PYTHON, EVALUATE, "run=outputs/cards/a", "seeds=[0,1,2]"]
    assert second.command[2:] == ["run=outputs/cards/c", "seeds=[0,1,2]", 'prompts=["a red cup","a blue fox"]']
    assert (second.device, second.folder) == ("cuda:1", str(other))
    assert page.submit("/compare/evaluate", of=[], seeds=3)["status"] == 400
    assert page.submit("/compare/evaluate", of=[f"{other}@base"], seeds=0)["field"] == "seeds"


@pytest.mark.parametrize(
    ("of", "status"),
    [("../x@step 10", 403), ("outputs/cards/a@../b", 400), ("outputs/cards/a", 400), ("outputs/no@base", 400)],
)
def test_what_is_no_checkpoint_of_an_opened_run_is_refused(page, two, of, status):
    assert shown(page, of, "outputs/cards/a@base", status=status)
    assert page.submit("/compare/blind", of=[of, "outputs/cards/a@base"])["status"] == status


def test_more_checkpoints_than_fit_side_by_side_are_refused(page, two):
    assert "at most 8" in shown(page, *(f"{two[0]}@step {i}" for i in range(1, 10)), status=400)


def ask(page, of):
    return page.submit("/compare/blind", of=of)["html"]


def fields(html):
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', html))


def answer(page, html, picked):
    given = fields(html)
    return page.submit("/compare/choose", comparison=given["comparison"], number=int(given["number"]), picked=picked)


def test_a_blind_pair_has_no_names_and_its_pictures_are_of_one_prompt_and_seed(page, two):
    of = [f"{two[0]}@step 10", f"{two[0]}@step 20"]
    html = ask(page, of)
    visible = html.partition("<details>")[0]
    assert "step" not in visible
    assert "/a" not in visible
    addresses = [unescape(one) for one in re.findall(r'src="([^"]*)"', html)]
    contents = [page.get(address) for address in addresses]
    assert all(b"step" not in found.content and "disposition" not in str(found.headers) for found in contents)
    colors = {pixel(page, address) for address in addresses}
    source = {frozenset({GREEN, BLUE}), *(frozenset({color_of(10, i), color_of(20, i)}) for i in (0, 1))}
    assert frozenset(colors) in source
    assert ask(page, of) == html  # until it is answered, also in another window


def test_choices_are_kept_counted_and_each_pair_is_shown_once(page, two):
    of = [f"{two[0]}@step 10", f"{two[0]}@step 20"]
    html, seen = ask(page, of), set()
    assert "There is none yet" in html
    for count in range(6):  # two of the sample grid, four of the evaluation
        addresses = [unescape(one) for one in re.findall(r'src="([^"]*)"', html)]
        colors = [pixel(page, address) for address in addresses]
        later = [color in (BLUE, color_of(20, 0), color_of(20, 1)) for color in colors]
        assert sorted(later) == [False, True]
        seen.add(words(html).partition(": which")[0])
        html = answer(page, html, ("left", "right")[later.index(True)] if count else "neither")["html"]
        if count < 5:
            assert f"Tally of {count + 1} answer" in html
    assert len(seen) == 6
    assert "All pairs were judged" in html
    assert "step 20 was picked 5 of 5 times against step 10, and neither 1 time." in words(html)
    assert "would come up in 6% of such series. This may well be chance." in words(html)
    (file,) = (page.known.workspace.outputs / "studio" / "choices").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["entries"] == sorted(of)
    assert [one["picked"] for one in kept["shown"]].count("neither") == 1
    assert "All pairs were judged" in ask(page, list(reversed(of)))  # the order of choosing makes no other comparison
    assert "Show two pictures" in page.submit("/compare/restart", of=of)["html"]
    assert "There is none yet" in ask(page, of)


def test_an_answer_counts_once(page, two):
    of = [f"{two[0]}@step 10", f"{two[0]}@step 20"]
    html = ask(page, of)
    address = unescape(re.findall(r'src="([^"]*)"', html)[0])
    results, both = [], threading.Barrier(2)

    def pick(side):
        both.wait()
        results.append(answer(page, html, side)["status"])

    threads = [threading.Thread(target=pick, args=(side,)) for side in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [200, 400]
    assert "answered already" in answer(page, html, "left")["error"]
    assert page.get(address).status_code == 400  # of the answered pair
    assert "Tally of 1 answer" in ask(page, of)


def test_a_pair_whose_pictures_disappeared_is_replaced(page, two):
    of = [f"{two[1]}@step 10", f"{two[1]}@base"]
    gone = next(prompt for prompt in PROMPTS if prompt in ask(page, of))
    write_grid(two[1], 10, ["other" if prompt == gone else prompt for prompt in PROMPTS])
    again = ask(page, of)
    assert gone not in again
    assert fields(again)["number"] == "1"
    assert len(re.findall('src="', again)) == 2


def test_what_is_wrong_with_a_choice_is_an_error(page, two):
    of = [f"{two[0]}@step 10", f"{two[0]}@step 20"]
    assert "at least two" in page.submit("/compare/blind", of=of[:1])["error"]
    given = fields(ask(page, of))
    assert page.submit("/compare/choose", comparison="../../x", number=1, picked="left")["status"] == 400
    assert page.submit("/compare/choose", comparison="0" * 16, number=1, picked="left")["status"] == 400
    wrong = page.submit("/compare/choose", comparison=given["comparison"], number=1, picked="both")
    assert (wrong["status"], wrong["field"]) == (422, "picked")
    (file,) = (page.known.workspace.outputs / "studio" / "choices").glob("*.json")
    file.write_text('{"entries": ["a", "b"], "shown": [{"place": 1}]}')
    assert str(file) in page.submit("/compare/blind", of=of)["error"]


def test_a_picture_of_a_grid_and_of_an_evaluation_is_judged_once():
    places = {i: {(source, "p", 0) for source in ("grid", "evaluation")} for i in range(2)}
    comparison = Comparison(("a", "b")).with_next(places, random.Random(0)).picked(1, "left")
    assert comparison.with_next(places, random.Random(0)) == comparison


def test_pairs_are_taken_in_turn_and_in_both_orders():
    places = {0: {("s", "p", i) for i in range(30)}, 1: {("s", "p", i) for i in range(30)}, 2: {("s", "p", 0)}}
    comparison, chance = Comparison(("a", "b", "c")), random.Random(0)
    for number in range(1, 33):
        comparison = comparison.with_next(places, chance).picked(number, "left")
    assert comparison.with_next(places, chance) == comparison  # 30 of the first two, one of each other pair
    first = [{pair.left, pair.right} for pair in comparison.shown[:3]]
    assert sorted(map(sorted, first)) == [[0, 1], [0, 2], [1, 2]]
    sides_of_a = [pair.left == 0 for pair in comparison.shown if {pair.left, pair.right} == {0, 1}]
    assert 5 < sum(sides_of_a) < 25
    assert len({pair.place for pair in comparison.shown}) == 30


@pytest.mark.parametrize(
    ("one", "other", "chance"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (6, 0, 2 / 64), (7, 3, 2 * 176 / 1024), (3, 7, 2 * 176 / 1024)],
)
def test_the_chance_of_a_count_is_that_of_a_sign_test(one, other, chance):
    assert choices.chance_of(one, other) == pytest.approx(min(1, chance))


def test_a_count_says_how_sure_it_is():
    assert choices.statement("a", "b", 1, 7, 0).startswith("b was picked 7 of 8 times against a. If both")
    assert "in 7% of such series. This may well be chance." in choices.statement("a", "b", 1, 7, 0)
    assert "in 3% of such series. This is more than chance explains." in choices.statement("a", "b", 6, 0, 0)
    assert "less than 1%" in choices.statement("a", "b", 20, 0, 0)
    assert choices.statement("a", "b", 0, 0, 2) == "a and b: neither was picked 2 times. This says nothing yet."


def test_a_comparison_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "x" / "one.json"
    assert choices.read_comparison(file) is None
    kept = Comparison(("a", "b"), (ShownPair(("s", "p", 3), 1, 0, "left"), ShownPair(("s", "p", 4), 0, 1)))
    choices.write_comparison(file, kept)
    assert choices.read_comparison(file) == kept
    values = json.loads(file.read_text())
    for change in (
        {"left": 2},
        {"left": 1},
        {"left": True},
        {"picked": "x"},
        {"place": ["s", "p", -1]},
        {"place": [1]},
    ):
        changed = {**values, "shown": [values["shown"][0] | {"left": 1, "right": 0}, {**values["shown"][1], **change}]}
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"one\.json holds no blind choices"):
            choices.read_comparison(file)


def test_an_evaluation_is_read_with_its_files_in_its_own_folder(two):
    found = read_evaluation(two[0])
    assert found.labels == [f"{prompt} (seed {seed})" for prompt in PROMPTS for seed in (0, 1)]
    assert [row.name for row in found.rows] == ["base", "step 10", "step 20"]
    assert all(file.is_file() for row in [*found.rows, *found.strengths] for file in row.files)
    assert [row.strength for row in found.strengths] == [0, 1]
    assert [len(row.files) for row in found.strengths] == [2, 2]
    assert read_evaluation(two[1]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"columns": [[0, 0], [9, 0]]},
        {"columns": [[0, -1]]},
        {"columns": []},
        {"rows": []},
        {"rows": [{"name": "a", "step": None, "strength": 1, "files": ["../../secret.png"] * 4}]},
        {"rows": [{"name": "a", "step": None, "strength": 1, "files": ["/etc/passwd"] * 4}]},
        {"rows": [{"name": "a", "step": "1", "strength": 1, "files": ["a"] * 4}]},
        {"rows": [{"name": "a", "step": None, "strength": 1, "files": ["a"]}]},
        {"strengths": 3},
        {"prompts": None},
    ],
)
def test_an_evaluation_of_someone_else_leads_nowhere(two, change):
    file = two[0] / "evaluation" / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"evaluation\.json is not the file of an evaluation"):
        read_evaluation(two[0])
    assert compare.evaluation_of(two[0])[0] is None


def test_a_picture_behind_a_link_is_not_sent(page, two, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "secret.png")
    file = two[0] / "evaluation" / "pictures" / "step_10_0_0.png"
    file.unlink()
    file.symlink_to(tmp_path / "secret.png")
    assert page.get("/compare", params={"of": [f"{two[0]}@step 10", f"{two[0]}@base"]}).status_code == 403
