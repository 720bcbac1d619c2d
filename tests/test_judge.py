"""analysis/judge.py: a language model as judge, asked over HTTP (a server that the test starts)."""
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, fails, read_lines, write_rows

import evaluate
import judge

KEY = "sk-secret-of-the-test"


class Judge(BaseHTTPRequestHandler):
    """Gives a response as many points as it has stars; server.script holds the faults of the next requests."""
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            fault = server.script.pop(0) if server.script else server.always
        stars = body["messages"][1]["content"].count("*")
        says = {"prose": "I would say four or five points.", "refusal": None}.get(fault, f"Score: {stars} Evaluation evidence: stars.")
        reply = json.dumps({"choices": [] if fault == "empty" else [{"message": {"content": says}}]})
        status = {"limited": 429, "broken": 500, "refused": 401, "filtered": 400}.get(fault, 200)
        text = {"malformed": reply[:20], "refused": f"bad key {self.headers['Authorization']}", "filtered": "content_filter"}.get(fault, reply)
        if fault == "dropped":
            return self.connection.close()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.lock, server.requests, server.script = True, threading.Lock(), [], []
    server.always = "good"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge_args(server, tmp_path, monkeypatch):
    """a beats b on 3 questions of 6, ties on 2, loses 1."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(judge, "TRIES", 4)
    stars = {"a": [5, 4, 3, 2, 2, 0], "b": [1, 1, 2, 2, 2, 1]}
    write_rows(tmp_path / "answers.jsonl", [{"model": model, "prompt": f"question {i}", "response": f"{i} {model} " + "*" * n}
                                            for model in stars for i, n in enumerate(stars[model])])
    return judge.Args(answers=[str(tmp_path / "answers.jsonl")], judge_url=f"http://127.0.0.1:{server.server_port}/v1",
                      output=str(tmp_path / "judge"), concurrency=3)


@pytest.mark.parametrize("text, score", [
    ("Score: 3 Evaluation evidence: fine", 3), ("Score: 0\nEvaluation evidence:\nnothing", 0),
    ("**Score:** 5\n\n**Evaluation evidence:** great", 5), (" Score: 4/5. Evaluation evidence: good", 4),
    ("Score: 6 Evaluation evidence: more than all", None), ("Score: 3.5 Evaluation evidence: between", None),
    ("Score: 3-4 Evaluation evidence: between", None), ("Score: 4", None), ("4 Evaluation evidence: good", None),
    ("The total is Score: 4 Evaluation evidence: good", None), ("Score: four Evaluation evidence: good", None),
    ("Score: 2 Evaluation evidence: poor. No, Score: 4", None), ("Score: 10 Evaluation evidence: ?", None), ("", None),
    ("Score: 4/10 Evaluation evidence: half", None), ("Score: -1 Evaluation evidence: bad", None)])
def test_a_verdict_is_read_or_counted_never_guessed(text, score):
    assert judge.parse_verdict(text) == score


def test_the_rubric_is_appendix_i():
    system, user = judge.judge_messages("Why?", "Because.")
    assert user["content"] == "<Question>: Why?\n<response>: Because."
    assert system["content"].count("point") >= 7 and "Score: <total score> Evaluation evidence:" in system["content"]
    paper = ROOT.parent / "shared" / "paper" / "paper.txt"
    if paper.is_file():                                       # beside the repository where it is developed
        def plain(text):
            return "".join(text.replace("’", "'").replace("Al Assistant", "AI Assistant").replace("refecting", "reflecting").split())

        text = paper.read_text(encoding="utf-8")
        text = text[text.index("Review the user"):text.index("User input prompt:")]
        assert plain(text) == plain(system["content"])


def test_scores_and_wins(server, judge_args, capsys):
    result = judge.main(judge_args)
    assert result["outcomes"]["a"]["b"] == {"win": 3 / 6, "tie": 2 / 6, "lose": 1 / 6, "pairs": 6}
    assert result["outcomes"]["b"]["a"]["lose"] == 3 / 6 and result["unjudged"] == 0
    assert result["models"]["a"]["score"]["mean"] == pytest.approx(16 / 6)
    assert result["models"]["a"]["points"] == {"0": 1, "1": 0, "2": 2, "3": 1, "4": 1, "5": 1}
    assert len(server.requests) == 12
    assert {(path, key) for path, key, _ in server.requests} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert all(body["temperature"] == 0 and body["model"] == judge_args.judge_model for _, _, body in server.requests)
    said = capsys.readouterr().out
    assert "12 requests to make" in said and "wins 50.0%, ties 33.3%, loses 16.7%" in said
    assert all(KEY not in text for text in (said, *(file.read_text() for file in Path(judge_args.output).iterdir())))
    assert [line["score"] for line in read_lines(Path(judge_args.output) / "verdicts.jsonl")] == [5, 4, 3, 2, 2, 0, 1, 1, 2, 2, 2, 1]
    fails(lambda: judge.main(judge_args), "judge.json: exists")
    again = judge.main(replace(judge_args, overwrite=True))
    assert again == result and len(server.requests) == 12     # all of it from disk
    judge.main(replace(judge_args, overwrite=True, judge_model="another"))
    assert len(server.requests) == 24                         # another judge is another question


@pytest.mark.parametrize("fault", ["malformed", "limited", "dropped", "broken", "empty"])
def test_a_fault_that_passes_is_asked_again(server, judge_args, fault):
    server.script = ["good", fault, "good", fault, fault]
    result = judge.main(judge_args)
    assert result["outcomes"]["a"]["b"] == {"win": 3 / 6, "tie": 2 / 6, "lose": 1 / 6, "pairs": 6}
    assert len(server.requests) == 12 + 3                     # every fault costs one more request, no more


@pytest.mark.parametrize("fault, requests", [("limited", 4), ("refused", 1)])
def test_a_run_that_fails_keeps_what_it_paid_for(server, judge_args, fault, requests, capsys):
    server.script, server.always = ["good"] * 5, fault
    with pytest.raises(SystemExit, match="no answer") as stop:
        judge.main(replace(judge_args, concurrency=1))
    kept = Path(judge_args.output) / "replies.jsonl"
    assert 5 + requests <= len(server.requests) < 5 + 7 * requests             # a few jobs and retries, not all that are left
    assert KEY not in str(stop.value) + capsys.readouterr().out and not (kept.parent / "judge.json").exists()
    kept.write_text(kept.read_text() + '\n{"request": "cut o')  # the machine went down while it wrote
    server.always, before = "good", len(server.requests)
    assert judge.main(judge_args)["outcomes"]["a"]["b"]["win"] == 3 / 6
    assert len(server.requests) - before == 7
    assert judge.main(replace(judge_args, overwrite=True))["unjudged"] == 0 and len(server.requests) - before == 7


def test_what_cannot_be_read_is_counted(server, judge_args):
    server.script = ["prose", "refusal", "filtered"]
    some = judge.main(replace(judge_args, concurrency=1))
    assert some["unjudged"] == 3 and 3 <= some["outcomes"]["a"]["b"]["pairs"] <= 5         # its pair does not count
    lost = [line["verdict"] for line in read_lines(Path(judge_args.output) / "verdicts.jsonl") if line["score"] is None]
    assert sorted(lost) == ["", "I would say four or five points.", "None"]
    server.always = "prose"
    nothing = judge.main(replace(judge_args, output=judge_args.output + "2"))
    assert nothing["unjudged"] == 12 and nothing["models"]["a"]["score"] is None and nothing["outcomes"]["a"]["b"]["pairs"] == 0


def test_more_answers_and_other_files(server, judge_args, tmp_path):
    """Equal answers are judged once; the interval is over prompts; AlpacaEval's files can be judged, in any order."""
    stars = [1] * 5 + [4] * 5
    write_rows(tmp_path / "more.jsonl", [{"model": model, "prompt": f"q{i // 5}", "response": f"{i} " + "*" * n}
                                         for model in "ab" for i, n in enumerate(stars)])
    result = judge.main(replace(judge_args, answers=[str(tmp_path / "more.jsonl")]))
    assert len(server.requests) == 10 and result["outcomes"]["a"]["b"]["tie"] == 1
    assert result["models"]["a"]["score"] == evaluate.bootstrap(stars, 1, [f"q{i // 5}" for i in range(10)]) != evaluate.bootstrap(stars, 1)
    for name, good in (("x", 1), ("y", -1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            [{"instruction": f"do {i}", "output": f"{name} " + "*" * i, "generator": name, "dataset": "d"} for i in range(3)][::good]))
    files = [str(tmp_path / "x.json"), f"renamed={tmp_path / 'y.json'}"]
    result = judge.main(replace(judge_args, answers=files, overwrite=True))
    assert result["outcomes"]["x"]["renamed"] == {"win": 0, "tie": 1, "lose": 0, "pairs": 3}


def test_dry_run_asks_nothing(server, judge_args, capsys):
    assert judge.main(replace(judge_args, dry_run=True)) is None
    assert "12 requests" in capsys.readouterr().out and not server.requests and not Path(judge_args.output).exists()


def test_bad_answers(server, judge_args, tmp_path, monkeypatch):
    good, bad = {"model": "a", "prompt": "q", "response": "r"}, tmp_path / "bad.jsonl"
    for rows, message in (([good | {"response": None}], "row 1 lacks"), ([good, {"prompt": "q"}], "row 2 lacks"),
                          ([good, good | {"model": "b", "prompt": "another"}], "a and b have not answered the same")):
        write_rows(bad, rows)
        fails(lambda: judge.main(replace(judge_args, answers=[str(bad)])), message)
    fails(lambda: judge.main(replace(judge_args, answers=judge_args.answers * 2)), "two files have a model 'a'")
    bad.write_text('{"model"\n')
    fails(lambda: judge.main(replace(judge_args, answers=[str(bad)])), "cannot be read")
    monkeypatch.delenv("OPENAI_API_KEY")
    fails(lambda: judge.main(judge_args), "OPENAI_API_KEY is not set")
    assert not server.requests
