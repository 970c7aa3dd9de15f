import csv

import pytest
from eval.tiny import QUESTIONS, model, plain_score, tokenizer, write_mmlu

from llm.eval import mmlu
from llm.eval.mmlu import CATEGORIES, CATEGORY, LETTERS, accuracy, evaluate_subject, read_subjects, summary
from llm.eval.results import Kept
from llm.log import UserError

ONE_SHOT = """The following are multiple choice questions (with answers) about world religions.

How many legs has a spider?
A. six
B. eight
C. ten
D. none
Answer: B

What is 1+1?
A. 1
B. 2
C. 3
D. 4
Answer:"""


@pytest.fixture
def folder(tmp_path):
    return write_mmlu(tmp_path / "mmlu", ["anatomy", "world_religions"])


def test_the_prompt_is_letter_for_letter_the_standard_one(folder):
    subject = read_subjects(folder, ["world_religions"])[0]
    assert subject.prompt(subject.questions[1], 1) == ONE_SHOT


def by_definition(prompt: str, seq_len: int) -> str:
    """The letter whose text has the largest probability behind the prompt."""
    context = tokenizer().encode(prompt).tolist()
    found = []
    for letter in LETTERS:
        continuation = tokenizer().encode(f"{prompt} {letter}").tolist()[len(context) :]
        found.append(plain_score(model(seq_len), [*context, *continuation][-seq_len - 1 : -len(continuation)], continuation)[0])
    return LETTERS[found.index(max(found))]


@pytest.mark.parametrize("shots", [0, 2])
def test_the_answer_is_the_letter_whose_text_is_likeliest(folder, shots):
    assert {len(tokenizer().encode(f" {letter}")) for letter in LETTERS} == {1, 2}  # so that dividing by lengths would show
    answers = ""
    for subject in read_subjects(folder, shots=shots):
        found = evaluate_subject(model(), tokenizer(), subject, shots)
        assert found["answers"] == "".join(by_definition(subject.prompt(q, shots), 512) for q in subject.questions)
        assert found["correct"] == [int(mine == q.answer) for mine, q in zip(found["answers"], subject.questions, strict=True)]
        assert (found["fewer_shots"], found["cut"]) == (0, 0)
        answers += found["answers"]
    assert len(set(answers)) > 1, answers


def test_a_prompt_that_is_too_long_loses_examples_then_its_beginning_and_both_are_counted(folder):
    subject = read_subjects(folder, ["anatomy"], shots=2)[0]
    lengths = [[len(tokenizer().encode(subject.prompt(q, kept))) for kept in (0, 1, 2)] for q in subject.questions]
    seq_len = sorted(two for _, _, two in lengths)[0] + 1  # the letters have two tokens, and the second is not read
    shortest = min(zero for zero, _, _ in lengths)
    found = evaluate_subject(model(seq_len), tokenizer(), subject, 2)
    kept = [max([k for k in (0, 1, 2) if its[k] + 1 <= seq_len], default=0) for its in lengths]
    assert set(kept) >= {1, 2} and found["fewer_shots"] == sum(k < 2 for k in kept) and found["cut"] == 0
    assert found["answers"] == "".join(by_definition(subject.prompt(q, k), seq_len) for q, k in zip(subject.questions, kept, strict=True))
    found = evaluate_subject(model(shortest + 1), tokenizer(), subject, 2)
    assert found["cut"] == sum(zero > shortest for zero, _, _ in lengths) > 0
    assert found["answers"] == "".join(by_definition(subject.prompt(q, 0), shortest + 1) for q in subject.questions)


def test_57_subjects_are_in_four_categories():
    assert len(CATEGORY) == 57 == sum(len(subjects.split()) for subjects in CATEGORIES.values())


def test_the_summary_weighs_questions_in_categories_and_subjects_in_macro():
    found = summary({"anatomy": [1, 0, 0, 1], "astronomy": [1, 1], "virology": [0, 0, 0, 1]})
    assert found["STEM"]["acc"] == 4 / 6 and found["other"]["acc"] == 1 / 4 and found["all"]["acc"] == 5 / 10
    assert found["macro"]["acc"] == pytest.approx((1 / 2 + 1 + 1 / 4) / 3)
    # squared deviations: 1 in anatomy, 0 in astronomy, 3/4 in virology; pooled variance over n - 3, of the mean over n
    assert found["all"]["stderr"] == pytest.approx((1.75 / 7 / 10) ** 0.5)
    assert found["macro"]["stderr"] == pytest.approx((1 / 3 / 4 + 0 + 0.75 / 3 / 4) ** 0.5 / 3)
    assert accuracy([1, 0, 0, 1])["stderr"] == pytest.approx((1 / 3 / 4) ** 0.5)
    assert set(found) == {"STEM", "other", "all", "macro"}


def test_a_subject_is_computed_once_for_the_same_weights_and_data(tmp_path):
    computed = []

    def ask(name: str, made_of: list) -> tuple[dict, bool]:
        return Kept(tmp_path, "mmlu-0-shot").get(name, made_of, lambda: computed.append(name) or {"correct": [1, 0]})

    assert ask("anatomy", ["weights", "data"])[1] is False
    part, was_there = ask("anatomy", ["weights", "data"])
    assert was_there and part["correct"] == [1, 0] and computed == ["anatomy"]
    assert ask("anatomy", ["weights", "other data"])[1] is False and ask("virology", ["weights", "data"])[1] is False
    (tmp_path / "mmlu-0-shot.json").write_text("{")
    assert ask("virology", ["weights", "data"])[1] is False


WRONG = {
    "no folder": (lambda folder: folder / "nowhere", {}, "nowhere: holds no subject"),
    "an unknown subject": (lambda folder: folder, {"names": ["alchemy"]}, "has no subject alchemy; there are anatomy, world_religions"),
    "too few examples": (lambda folder: folder, {"shots": 3}, "anatomy has 2 examples for 3 shots"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_not_mmlu_is_refused(folder, case):
    path, words, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        read_subjects(path(folder), **words)


NO_QUESTIONS = [(QUESTIONS[0][:5], "record 1: 5 columns"), ((*QUESTIONS[0][:5], "E"), "record 1: 6 columns, the last \\['E'\\]")]


@pytest.mark.parametrize(("row", "said"), NO_QUESTIONS)
def test_a_record_that_is_no_question_is_named(folder, row, said):
    with open(folder / "test" / "anatomy_test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)
    with pytest.raises(UserError, match="anatomy_test.csv, " + said):
        read_subjects(folder)


def test_characters_that_only_look_like_line_breaks_stay_in_their_field(folder):
    row = ["What\u2028is\x85this\x0c?", "a", "b", "c", "d", "A"]
    with open(folder / "test" / "anatomy_test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row)
    (question,) = read_subjects(folder, ["anatomy"])[0].questions
    assert question.text == row[0]


def test_commas_quotes_and_line_breaks_inside_fields_stay(folder):
    question = read_subjects(folder, ["anatomy"])[0].questions[1]
    assert question.text == QUESTIONS[1][0] and question.choices == QUESTIONS[1][1:5] and mmlu.LETTERS == "ABCD"
