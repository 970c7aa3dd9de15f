"""Each recipe on a little data of its true shape, fetching that is resumed and verified, and answers that are asked for once."""

import gzip
import hashlib
import http.server
import io
import json
import threading
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.corpus import fetch, rewrite
from llm.corpus.collect import collect
from llm.corpus.recipes import RECIPES
from llm.corpus.rewrite import Rewriter
from llm.eval.mmlu import read_subjects
from llm.log import UserError


def parquet(*rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
BOOK = "X\r\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\nChapter 1.\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\nnotes"
SQUAD = {"id": "1", "title": "t", "context": "Ann is here.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}}
TRUE_SHAPES = {
    "story": ("data/train-0.parquet", parquet({"text": "Once upon a time."}), "Once upon a time."),
    "dailydialog": ("train.parquet", parquet({"dialog": ["u", "a"], "act": [1, 2], "emotion": [0, 0]}), TALK),
    "chat": ("train_sft-0.parquet", parquet({"prompt": "u", "prompt_id": "1", "messages": TALK}), TALK),
    "chitchat": ("train.csv", b'user 1 personas,user 2 personas,Best Generated Conversation\n"I.","I.","User 1: u\nUser 2: a"\n', TALK),
    "knowledge": (
        "train.parquet",
        parquet(SQUAD),
        [{"role": "user", "content": "Ann is here.\n\nWho?"}, {"role": "assistant", "content": "Ann"}],
    ),
    "dictionary": ("g.json", json.dumps({"go": {"meanings": [{"def": "move", "speech_part": "verb"}]}}).encode(), "go (verb): move"),
    "c4": ("c4-train.00000.json.gz", gzip.compress(lines({"text": "A page.", "timestamp": "2019", "url": "http://x"})), "A page."),
    "gutenberg": ("train-0.parquet", parquet({"TEXT": BOOK, "SOURCE": "x", "METADATA": "{}"}), "Chapter 1."),
    "books": ("book.txt", BOOK.encode(), "Chapter 1."),
    "wikipedia": ("train-0.parquet", parquet({"id": "1", "url": "u", "title": "T", "text": "An article."}), "An article."),
    "alpaca": ("train.parquet", parquet({"instruction": "u", "input": "", "output": "a", "text": "Below is an instruction"}), TALK),
    "dolly": ("databricks-dolly-15k.jsonl", lines({"instruction": "u", "context": "", "response": "a", "category": "open_qa"}), TALK),
    "gsm8k": ("train.parquet", parquet({"question": "u", "answer": "a"}), TALK),
    "mmlu": (
        "abstract_algebra_test.csv",
        b"q?,1,2,3,4,B\n",
        [{"role": "user", "content": "q?\nA. 1\nB. 2\nC. 3\nD. 4"}, {"role": "assistant", "content": "B. 2"}],
    ),
}


def test_every_recipe_has_a_case_here():
    assert set(TRUE_SHAPES) == set(RECIPES) - {"pystdlib"}


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_a_recipe_makes_documents_of_its_files(name, tmp_path):
    file, content, expected = TRUE_SHAPES[name]
    (tmp_path / "in" / file).parent.mkdir(parents=True)
    (tmp_path / "in" / file).write_bytes(content)
    assert collect(name, tmp_path / "out.jsonl", inputs=[str(tmp_path / "in")])[0] == 1
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["text"] if isinstance(expected, str) else record["messages"]) == expected


def test_a_sample_is_a_share_of_the_documents_chosen_by_their_texts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"document {i}"} for i in range(2000))))
    (tmp_path / "b.jsonl").write_bytes(lines(*({"text": f"document {i}"} for i in reversed(range(2000)))))
    chosen = []
    for name in "ab":
        collect("c4", tmp_path / f"{name}.out", inputs=[str(tmp_path / f"{name}.jsonl")], sample=0.1)
        chosen.append({json.loads(line)["text"] for line in (tmp_path / f"{name}.out").read_text().splitlines()})
    assert chosen[0] == chosen[1] and 150 < len(chosen[0]) < 250


def test_a_recipe_that_cannot_be_downloaded_says_why(tmp_path):
    with pytest.raises(UserError, match="Books3.*no longer distributed.*--from"):
        collect("books", tmp_path / "out.jsonl")


# fetching


class Server(http.server.BaseHTTPRequestHandler):
    """Sends half a file first and then breaks off; then all of it. Answers chats, but not each time."""

    content, asked, chats = bytes(range(256)) * 40, 0, 0

    def do_GET(self):
        Server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: None if self.asked > 1 else len(self.content) // 2])

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        Server.chats += 1
        self.send_response(503 if Server.chats % 3 == 1 else 200)
        self.end_headers()
        if Server.chats % 3:
            self.wfile.write(json.dumps({"choices": [{"message": {"content": f"It is {question[-2:]}"}}]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(rewrite, "FIRST_PAUSE_S", 0.001)
    Server.asked, Server.chats = 0, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_a_download_that_breaks_off_is_tried_again_and_one_that_is_there_is_not(server, tmp_path):
    (tmp_path / "a.json.part").write_bytes(b"what a killed run has left")
    for _ in range(2):
        path = fetch.from_address(f"{server}/a.json", tmp_path / "a.json")
        assert path.read_bytes() == Server.content and Server.asked == 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_only_as_many_files_of_the_hub_come_as_the_sample_needs_and_each_is_held_against_its_hash(tmp_path, monkeypatch):
    content = lines(*({"text": f"document {i}"} for i in range(1000)))
    entries = [SimpleNamespace(path=f"en/c4-train.{i}.json.gz", size=len(content), lfs=None) for i in range(10)]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *_, **__: [*entries, SimpleNamespace(path="README.md", size=1, lfs=None)])
    fetched = []

    def download(repo, name, repo_type, local_dir):
        fetched.append(name)
        (local_dir / "en").mkdir(exist_ok=True)
        (local_dir / name).write_bytes(content)
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    paths, share = fetch.fetch(RECIPES["c4"], tmp_path, 0.15)
    assert fetched == ["en/c4-train.0.json.gz", "en/c4-train.1.json.gz"] and len(paths) == 2 and share == pytest.approx(0.75)
    for wrong in ({"size": 1, "lfs": None}, {"size": len(content), "lfs": SimpleNamespace(sha256="0" * 64)}):
        vars(entries[0]).update(wrong)
        with pytest.raises(UserError, match="did not arrive whole"):
            fetch.fetch(RECIPES["c4"], tmp_path, 0.1)
        assert not paths[0].exists()
    vars(entries[0]).update(size=len(content), lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()))
    assert fetch.fetch(RECIPES["c4"], tmp_path, 0.1)[0] == [paths[0]]


def test_mmlu_comes_with_its_examples_and_in_the_layout_that_evaluation_reads(tmp_path, monkeypatch):
    def row(subject: str, i: int) -> dict:
        question = f'{subject} "{i}", or\nnot?' if i % 2 else f"{subject} {i}\u2028?"
        return {"question": question, "subject": subject, "choices": [f"{i}", "b, c", "d", "e"], "answer": i % 4}

    splits = {"dev": 5, "validation": 2, "test": 7}
    contents = {f"all/{split}-00000-of-00001.parquet": parquet(*(row(s, i) for s in ("anatomy", "virology") for i in range(n)))
                for split, n in splits.items()}  # fmt: skip
    entries = [SimpleNamespace(path=path, size=len(content), lfs=None) for path, content in contents.items()]
    others = [SimpleNamespace(path=f"{folder}/test-00000-of-00001.parquet", size=1, lfs=None) for folder in ("anatomy", "auxiliary_train")]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *_, **__: [*others, *entries])

    def download(repo, name, repo_type, local_dir):
        (local_dir / name).parent.mkdir(exist_ok=True)
        (local_dir / name).write_bytes(contents[name])
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for _ in range(2):  # a second time changes nothing
        assert collect("mmlu", tmp_path / "mmlu.jsonl")[0] == 28
    subjects = read_subjects(tmp_path / "mmlu", shots=5)
    assert [(s.name, len(s.examples), len(s.questions)) for s in subjects] == [("anatomy", 5, 7), ("virology", 5, 7)]
    assert subjects[1].questions[6].text == row("virology", 6)["question"] and subjects[1].questions[6].choices == ("6", "b, c", "d", "e")
    assert "".join(question.answer for question in subjects[0].questions) == "ABCDABC"
    assert len(list((tmp_path / "mmlu" / "val").iterdir())) == 2
    contents["all/test-00000-of-00001.parquet"] = parquet(row("../../evil", 0))
    vars(entries[2]).update(size=len(contents["all/test-00000-of-00001.parquet"]))
    with pytest.raises(UserError, match="has a subject called '../../evil'"):
        collect("mmlu", tmp_path / "again" / "mmlu.jsonl")
    assert [path.name for path in (tmp_path / "again").iterdir()] == [".mmlu.files"]


# rewriting


def test_answers_are_rewritten_with_retries_and_each_is_asked_for_once(server, tmp_path):
    questions = [{**SQUAD, "question": f"What is number {i:02}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(lines(*questions))

    def run(out):
        collect("knowledge", tmp_path / out, inputs=[str(tmp_path / "a.jsonl")], rewrite=Rewriter(server, "m", tmp_path / "journal"))
        return [json.loads(line)["messages"][-1]["content"] for line in (tmp_path / out).read_text().splitlines()]

    assert run("one.jsonl") == [f"It is {i:02}" for i in range(5)] and Server.chats > 5  # some failed first
    asked = Server.chats
    with open(tmp_path / "journal", "a") as file:
        file.write('{"key": "cut o')  # as a kill would leave it
    assert run("two.jsonl") == run("one.jsonl") and Server.chats == asked


def test_a_server_that_is_not_there_is_told_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "FIRST_PAUSE_S", 0.001)
    (tmp_path / "a.jsonl").write_bytes(lines(SQUAD))
    with pytest.raises(UserError, match="no answer from model 'm'"):
        collect("knowledge", tmp_path / "o", inputs=[str(tmp_path / "a.jsonl")], rewrite=Rewriter("http://127.0.0.1:9", "m", tmp_path / "journal"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "journal"}
