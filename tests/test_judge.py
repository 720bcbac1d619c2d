"""evaluate.py judge: a language model as judge, asked over HTTP (a server that the test starts) or from a folder."""
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines, write_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evaluate

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
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        time.sleep(server.pause)
        with server.lock:
            server.busy -= 1
        stars = body["messages"][1]["content"].count("*")
        reply = {"choices": [{"message": {"content": f"Score: {stars} Evaluation evidence: {stars} stars."}}],
                 "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        if fault == "dropped":
            return self.connection.close()
        if fault == "slow":
            time.sleep(0.6)
        if fault == "prose":
            reply["choices"][0]["message"]["content"] = "I would say four or five points."
        if fault == "empty":
            reply["choices"] = []
        reply |= server.also
        reply["choices"] = [{"message": choice["message"] | server.message} for choice in reply["choices"]]
        status = {"limited": 429, "broken": 500, "refused": 401, "moved": 307, "filtered": 400}.get(fault, 200)
        text = {"malformed": '{"choices": [{"mess', "refused": f"{' ' * server.before} bad key {self.headers['Authorization']}",
                "error": '{"error": "over capacity"}', "filtered": '{"error": {"code": "content_filter"}}'}.get(fault, json.dumps(reply))
        with contextlib.suppress(OSError):                    # who has waited too long has hung up
            self.send_response(status)
            if fault == "limited":
                self.send_header("Retry-After", "0")
            if fault == "moved":
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(text.encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.lock, server.requests, server.script = True, threading.Lock(), [], []
    server.always, server.pause, server.busy, server.most_busy = "good", 0.0, 0, 0
    server.also, server.message, server.before = {}, {}, 0    # what else is in a reply, and in its message
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge_args(server, tmp_path, monkeypatch):
    """a beats b on 3 questions of 6, ties on 2, loses 1."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(evaluate.random, "uniform", lambda low, high: 0.01)    # hardly any pause between tries
    stars = {"a": [5, 4, 3, 2, 2, 0], "b": [1, 1, 2, 2, 2, 1]}
    write_rows(tmp_path / "answers.jsonl", [{"model": model, "prompt": f"question {i}", "response": f"{i} {model} " + "*" * n}
                                            for model in stars for i, n in enumerate(stars[model])])
    return evaluate.JudgeArgs(answers=[str(tmp_path / "answers.jsonl")], judge_url=server.url, output=str(tmp_path / "judge"),
                              timeout=0.3, retries=3, concurrency=3)


def change(args, **changes):
    return evaluate.JudgeArgs(**vars(args) | changes)


@pytest.mark.parametrize("text, score", [
    ("Score: 3 Evaluation evidence: fine", 3), ("Score: 0\nEvaluation evidence:\nnothing", 0),
    ("**Score:** 5\n\n**Evaluation evidence:** great", 5), (" Score: 4/5. Evaluation evidence: good", 4),
    ("Score: 6 Evaluation evidence: more than all", None), ("Score: 3.5 Evaluation evidence: between", None),
    ("Score: 3-4 Evaluation evidence: between", None), ("Score: 4", None), ("4 Evaluation evidence: good", None),
    ("The total is Score: 4 Evaluation evidence: good", None), ("Score: four Evaluation evidence: good", None),
    ("Score: 2 Evaluation evidence: poor. No, Score: 4", None), ("Score: 10 Evaluation evidence: ?", None), ("", None),
    ("Score: 4/10 Evaluation evidence: half", None), ("Score: -1 Evaluation evidence: bad", None)])
def test_a_verdict_is_read_or_counted_never_guessed(text, score):
    assert evaluate.parse_verdict(text) == score


def test_the_rubric_is_appendix_i():
    system, user = evaluate.judge_messages("Why?", "Because.")
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
    judge_args = change(judge_args, concurrency=1)            # so that requests come in the order of the queue
    result = evaluate.evaluate_judge(judge_args)
    assert result["outcomes"]["a"]["b"] == {"win": 3 / 6, "tie": 2 / 6, "lose": 1 / 6, "pairs": 6}
    assert result["outcomes"]["b"]["a"]["lose"] == 3 / 6
    assert result["models"]["a"]["score"]["mean"] == pytest.approx(16 / 6)
    assert result["models"]["a"]["points"] == {"0": 1, "1": 0, "2": 2, "3": 1, "4": 1, "5": 1}
    assert result["tokens"] == {"prompt_tokens": 1200, "completion_tokens": 120} and result["unjudged"] == 0
    assert len(server.requests) == 12 and {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert {key for _, key, _ in server.requests} == {f"Bearer {KEY}"}
    assert all(body["temperature"] == 0 and body["model"] == judge_args.judge_model for _, _, body in server.requests)
    said = capsys.readouterr().out
    assert "12 requests to make" in said and "50% / 33% / 17%" in said
    lines = read_lines(Path(judge_args.output) / "verdicts.jsonl")
    first = [line["model"] for line in lines if line["position"] == 1]         # randomised, and recorded
    assert len(first) == 6 and set(first) == {"a", "b"}
    sent = [body["messages"][1]["content"] for _, _, body in server.requests]
    for line in lines:
        number = int(line["prompt"].removeprefix("question "))
        assert sent[2 * number + line["position"] - 1].endswith(f"<response>: {line['response']}")
    for file in Path(judge_args.output).rglob("*"):                      # the key is in no file
        assert KEY not in file.read_text(encoding="utf-8")
    assert KEY not in said
    with pytest.raises(SystemExit, match="exists already"):
        evaluate.evaluate_judge(judge_args)


@pytest.mark.parametrize("fault", ["slow", "malformed", "limited", "dropped", "broken", "empty", "error"])
def test_a_fault_that_passes_is_asked_again(server, judge_args, fault):
    server.script = ["good", fault, "good", fault, fault]
    result = evaluate.evaluate_judge(judge_args)
    assert result["outcomes"]["a"]["b"] == {"win": 3 / 6, "tie": 2 / 6, "lose": 1 / 6, "pairs": 6}
    assert len(server.requests) == 12 + 3                     # every fault costs one more request, no more


@pytest.mark.parametrize("fault, requests", [("slow", 4), ("limited", 4), ("refused", 1), ("moved", 1)])
def test_a_judge_that_never_answers_ends_the_run(server, judge_args, fault, requests, capsys):
    server.always = fault
    with pytest.raises(SystemExit, match="gives no answer") as stop:
        evaluate.evaluate_judge(change(judge_args, concurrency=1))
    assert len(server.requests) == requests                   # one job and its retries, not all twelve
    assert KEY not in str(stop.value) + capsys.readouterr().out
    assert not (Path(judge_args.output) / "judge.json").exists()


def test_the_key_is_nowhere(server, judge_args, capsys):
    """A server that repeats it: in an error that is cut short, in a verdict, in what it says it used."""
    server.always = "refused"
    for server.before in range(250, 300, 7):
        with pytest.raises(SystemExit) as stop:
            evaluate.evaluate_judge(judge_args)
        assert KEY[:9] not in str(stop.value)
    server.always, server.message = "good", {"content": f"Score: 3 Evaluation evidence: your key is {KEY}"}
    server.also = {"usage": {"prompt_tokens": KEY, "completion_tokens": 7}, "id": KEY}
    result = evaluate.evaluate_judge(judge_args)
    assert result["models"]["a"]["points"]["3"] == 6 and result["tokens"] == {"prompt_tokens": 0, "completion_tokens": 84}
    assert not any(KEY in file.read_text() for file in Path(judge_args.output).rglob("*")) and KEY not in capsys.readouterr().out
    for url in (f"{server.url}/{KEY}", f"{server.url}#{KEY}"):
        with pytest.raises(SystemExit, match="does not belong in the address") as stop:
            evaluate.evaluate_judge(change(judge_args, judge_url=url))
        assert KEY not in str(stop.value)


@pytest.mark.parametrize("message, also", [({"content": None, "refusal": "I cannot judge this."}, {}), ({"content": None}, {}),
                                           ({"content": "\ud800 is half a character"}, {}), ({"content": [{"type": "text", "text": "No."}]}, {})])
def test_an_answer_that_is_no_verdict_is_counted_and_paid_once(server, judge_args, message, also):
    server.message = message
    assert evaluate.evaluate_judge(judge_args)["unjudged"] == 12 and len(server.requests) == 12


def test_content_in_parts_and_a_content_filter(server, judge_args):
    server.message = {"content": [{"type": "text", "text": "Score: 2 "}, {"type": "text", "text": "Evaluation evidence: parts"}]}
    server.also, server.script = {"usage": ["none"]}, ["filtered"]
    result = evaluate.evaluate_judge(judge_args)
    assert result["unjudged"] == 1 and sum(x["points"]["2"] for x in result["models"].values()) == 11


def test_a_dry_run_leaves_a_reply_without_a_line_end(server, judge_args):
    evaluate.evaluate_judge(judge_args)
    kept = Path(judge_args.output) / "replies.jsonl"
    kept.write_bytes(kept.read_bytes().removesuffix(b"\n"))   # whole, but for its end
    content, before = kept.read_bytes(), len(server.requests)
    evaluate.evaluate_judge(change(judge_args, dry_run=True))
    assert kept.read_bytes() == content
    evaluate.evaluate_judge(change(judge_args, overwrite=True, judge_url=server.url + "/"))        # the same address
    assert len(server.requests) == before and kept.read_bytes() == content + b"\n"


def test_one_judge_at_a_time(server, judge_args):
    """Another process holds the replies: nothing is asked, nothing is touched."""
    evaluate.evaluate_judge(judge_args)
    kept, before = Path(judge_args.output) / "replies.jsonl", len(server.requests)
    holder = subprocess.Popen([sys.executable, "-c", f"import fcntl, time; f = open({str(kept)!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
                               "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        verdicts = (kept.parent / "verdicts.jsonl").stat().st_mtime_ns
        with pytest.raises(SystemExit, match="another process is writing it"):
            evaluate.evaluate_judge(change(judge_args, overwrite=True, judge_model="another"))
        assert len(server.requests) == before and (kept.parent / "verdicts.jsonl").stat().st_mtime_ns == verdicts
    finally:
        holder.kill()


def test_verdicts_are_not_overwritten(server, judge_args):
    evaluate.evaluate_judge(judge_args)
    (Path(judge_args.output) / "judge.json").unlink()
    before = len(server.requests)
    with pytest.raises(SystemExit, match="verdicts.jsonl: exists already"):
        evaluate.evaluate_judge(change(judge_args, judge_model="another"))
    assert len(server.requests) == before                     # said before anything is paid


def test_ctrl_c_keeps_the_replies(server, judge_args):
    server.pause = 0.2
    command = [sys.executable, str(ROOT / "evaluate.py"), "judge", "--answers", *judge_args.answers, "--judge_url", server.url,
               "--output", judge_args.output, "--concurrency", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a job in the background ignores it
    while len(server.requests) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    kept = len(read_lines(Path(judge_args.output) / "replies.jsonl"))
    assert process.returncode == 1 and err.strip().endswith("begins again (values, policy)") and "Traceback" not in err
    assert 2 <= kept < 12 and kept == len(server.requests)    # what was under way ended, and is kept
    server.pause = 0.0
    evaluate.evaluate_judge(judge_args)
    assert len(server.requests) == 12


def test_an_interrupted_run_does_not_pay_twice(server, judge_args):
    server.script, server.always = ["good"] * 5, "refused"
    with pytest.raises(SystemExit, match="gives no answer"):
        evaluate.evaluate_judge(judge_args)
    kept = Path(judge_args.output) / "replies.jsonl"
    assert len(read_lines(kept)) == 5
    kept.write_text(kept.read_text() + '{"request": "cut o')  # the machine went down while it wrote
    server.always, before = "good", len(server.requests)
    result = evaluate.evaluate_judge(judge_args)
    assert len(server.requests) - before == 7 and len(read_lines(kept)) == 12
    assert result["outcomes"]["a"]["b"]["win"] == 3 / 6
    before = len(server.requests)
    again = evaluate.evaluate_judge(change(judge_args, overwrite=True))
    assert again == result and len(server.requests) == before  # all of it from disk
    evaluate.evaluate_judge(change(judge_args, overwrite=True, judge_model="another"))
    assert len(server.requests) == before + 12                # another judge is another question
    kept.write_text("nonsense\n" + kept.read_text())
    with pytest.raises(SystemExit, match="replies.jsonl:1: not a reply"):
        evaluate.evaluate_judge(change(judge_args, overwrite=True))
    assert len(read_lines(Path(judge_args.output) / "verdicts.jsonl")) == 12


def test_what_cannot_be_read_is_counted(server, judge_args, capsys):
    server.always = "prose"
    nothing = evaluate.evaluate_judge(judge_args)
    assert nothing["unjudged"] == 12 and nothing["models"]["a"]["score"] is None
    assert nothing["outcomes"]["a"]["b"]["pairs"] == 0
    server.always, server.script = "good", ["prose"]
    some = evaluate.evaluate_judge(change(judge_args, concurrency=1, output=judge_args.output + "2"))
    assert some["unjudged"] == 1 and some["outcomes"]["a"]["b"]["pairs"] == 5  # its pair does not count
    lost = [line for line in read_lines(Path(judge_args.output).parent / "judge2" / "verdicts.jsonl") if line["score"] is None]
    assert [line["verdict"] for line in lost] == ["I would say four or five points."]


def test_the_interval_is_over_prompts(server, judge_args, tmp_path):
    """Five answers to each of two questions: two draws, not ten."""
    stars = [1] * 5 + [4] * 5
    write_rows(tmp_path / "more.jsonl", [{"model": "a", "prompt": f"q{i // 5}", "response": f"{i} " + "*" * n} for i, n in enumerate(stars)])
    result = evaluate.evaluate_judge(change(judge_args, answers=[str(tmp_path / "more.jsonl")]))
    assert result["models"]["a"]["score"] == evaluate.bootstrap([float(n) for n in stars], 1, [f"q{i // 5}" for i in range(10)])
    assert result["models"]["a"]["score"] != evaluate.bootstrap([float(n) for n in stars], 1)


def test_equal_answers_are_judged_once(server, judge_args, tmp_path):
    write_rows(tmp_path / "same.jsonl", [{"model": model, "prompt": "q", "response": "the same *"} for model in "abc"])
    result = evaluate.evaluate_judge(change(judge_args, answers=[str(tmp_path / "same.jsonl")]))
    assert len(server.requests) == 1 and result["outcomes"]["a"]["c"] == {"win": 0, "tie": 1, "lose": 0, "pairs": 1}


def test_concurrency_is_limited_and_used(server, judge_args):
    server.pause = 0.05
    evaluate.evaluate_judge(judge_args)
    assert server.most_busy == 3


def test_dry_run_asks_nothing(server, judge_args, capsys):
    assert evaluate.evaluate_judge(change(judge_args, dry_run=True)) is None
    said = capsys.readouterr().out
    tokens = 12 * len(evaluate.RUBRIC) / 4
    assert "12 requests" in said and not server.requests and not Path(judge_args.output).exists()
    assert tokens < float(said.split("about ")[1].split(" tokens")[0].replace(",", "")) < 1.1 * tokens
    assert "at most 3,600 out" in said


def test_alpaca_eval_outputs_can_be_judged(server, judge_args, tmp_path):
    for name, stars in (("x", "**"), ("y", "*")):
        (tmp_path / f"{name}.json").write_text(json.dumps(
            [{"instruction": f"do {i}", "output": f"{i} {stars}", "generator": name, "dataset": "d"} for i in range(3)]))
    result = evaluate.evaluate_judge(change(judge_args, answers=[str(tmp_path / "x.json"), f"renamed={tmp_path / 'y.json'}"]))
    assert result["outcomes"]["x"]["renamed"] == {"win": 1, "tie": 0, "lose": 0, "pairs": 3}


@pytest.mark.parametrize("changes, message", [
    ({"judge_url": "http://me:pw@127.0.0.1/v1"}, "does not belong in the address"),
    ({"judge_url": "http://127.0.0.1/v1?api_key=x"}, "does not belong in the address"),
    ({"judge_url": "gpt-4o"}, "not an address"), ({"judge_url": "http://[::1"}, "not an address"), ({"timeout": 0.0}, "--timeout 0.0"),
    ({"judge_url": "http://127.0.0.1:99999/v1"}, "not an address"), ({"output": __file__}, "cannot be written"), ({"judge_url": ""}, "no such folder.*--judge_url"),
    ({"answers": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"), ({"concurrency": 0}, "--concurrency 0")])
def test_bad_settings(server, judge_args, changes, message):
    with pytest.raises(SystemExit, match=message):
        evaluate.evaluate_judge(change(judge_args, **changes))
    assert not server.requests


@pytest.mark.parametrize("key", ["", "  ", "sk-1\nInjected: header"])
def test_a_missing_key_is_said_first(server, judge_args, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit, match="OPENAI_API_KEY") as stop:
        evaluate.evaluate_judge(change(judge_args, answers=["not even looked for"]))
    assert "sk-1" not in str(stop.value) and not Path(judge_args.output).exists()


def test_bad_answers(judge_args, tmp_path):
    good = {"model": "a", "prompt": "q", "response": "r"}
    for rows, message in (([good | {"response": None}], ":1: .*response"), ([good, {"prompt": "q"}], ":2: .*model"),
                          ([good, good | {"model": "b", "prompt": "another"}], "a lacks 1 answers")):
        write_rows(tmp_path / "bad.jsonl", rows)
        with pytest.raises(SystemExit, match=message):
            evaluate.evaluate_judge(change(judge_args, answers=[str(tmp_path / "bad.jsonl")]))
    (tmp_path / "bad.jsonl").write_text('{"model"\n')
    with pytest.raises(SystemExit, match="bad.jsonl:1: "):
        evaluate.evaluate_judge(change(judge_args, answers=[str(tmp_path / "bad.jsonl")]))
    write_rows(tmp_path / "more.jsonl", [good])
    with pytest.raises(SystemExit, match="both have a model 'a'"):
        evaluate.evaluate_judge(change(judge_args, answers=[judge_args.answers[0], str(tmp_path / "more.jsonl")]))
    with pytest.raises(SystemExit, match="of 2 models"):
        evaluate.evaluate_judge(change(judge_args, answers=[f"one={judge_args.answers[0]}"]))
    write_rows(tmp_path / "most.jsonl", [good | {"model": model, "prompt": f"q{i}"} for model, n in (("a", 3), ("b", 2))
                                         for i in range(n)])
    skipped = evaluate.read_answers([str(tmp_path / "most.jsonl")], "skip")
    assert [len(answers) for answers in skipped.values()] == [2, 2]


def test_a_folder_as_judge(world, judge_args, server, tmp_path):
    """A model that says one verdict to whatever it reads: after <|assistant|> comes the verdict, after that the end."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.add_tokens(["Score: 4 Evaluation evidence: fine."])
    size = len(tokenizer) + len(tokenizer) % 2
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=2000, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False))
    says = len(tokenizer) - 1
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[says, tokenizer.convert_tokens_to_ids("<|assistant|>")] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id, says] = 1.0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "answers.jsonl", [{"model": name, "prompt": f"q{i}", "response": f"{name} " + "long " * 2000 * (name + str(i) == "b1")}
                                            for name in "ab" for i in range(3)])
    result = evaluate.evaluate_judge(change(judge_args, judge_url="", judge_model=str(tmp_path / "model"), batch_size=2))
    assert result["models"]["a"]["points"]["4"] == 3 and result["models"]["b"]["points"]["4"] == 2
    assert result["models"]["b"]["unreadable"] == 1           # longer than the judge's context: counted, not guessed
    assert result["outcomes"]["a"]["b"] == {"win": 0, "tie": 1, "lose": 0, "pairs": 2} and not server.requests
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")             # a template that knows no system prompt
    again = evaluate.evaluate_judge(change(judge_args, judge_url="", judge_model=str(tmp_path / "model"), output=judge_args.output + "2"))
    assert again["models"] == result["models"]
