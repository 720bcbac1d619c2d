"""A language model scores answers by the rubric of Appendix I; wins, ties and losses follow (Figure 2).

    python analysis/judge.py --answers runs/8b/eval/answers.jsonl --dry_run true
    OPENAI_API_KEY=... python analysis/judge.py --answers runs/8b/eval/answers.jsonl

The judge is asked at any OpenAI-compatible address, with one answer per request. Every reply is kept in
replies.jsonl, for it is paid: a run that was stopped goes on from there.
"""
import hashlib
import json
import math
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from answers import read_json  # noqa: E402
from evaluate import bootstrap, fail, new_file, outcomes, parse_args  # noqa: E402

MAX_TOKENS = 300                                              # of a verdict: the rubric asks for 100 words
TRIES, FIRST_PAUSE = 7, 1.0                                   # seconds; twice as long after each try

RUBRIC = """\
Review the user's question and the corresponding response using the additive 5-point scoring system \
described below. Points are accumulated based on the satisfaction of each criterion:
- Add 1 point if the response is relevant and provides some information related to the user's inquiry, even \
if it is incomplete or contains some irrelevant content.
- Add another point if the response addresses a substantial portion of the user's question, but does not \
completely resolve the query or provide a direct answer.
- Award a third point if the response answers the basic elements of the user's question in a useful way, \
regardless of whether it seems to have been written by an AI Assistant or if it has elements typically \
found in blogs or search results.
- Grant a fourth point if the response is clearly written from an AI Assistant's perspective, addressing \
the user's question directly and comprehensively, and is well-organized and helpful, even if there is \
slight room for improvement in clarity, conciseness or focus.
- Bestow a fifth point for a response that is impeccably tailored to the user's question by an AI \
Assistant, without extraneous information, reflecting expert knowledge, and demonstrating a high-quality, \
engaging, and insightful answer.
After examining the user's instruction and the response, please first give the total score. Then provide a \
brief explanation of your total score, up to 100 words. Output with the following format: Score: <total \
score> Evaluation evidence: <your brief explanation here>
Remember to assess from the AI Assistant perspective, utilizing web search knowledge as necessary. To \
evaluate the response in alignment with this additive scoring model, we'll systematically attribute points \
based on the outlined criteria."""


@dataclass
class Args:
    answers: list[str] = HfArg(default_factory=lambda: ["runs/atlas/eval/answers.jsonl"], help="FILE or "
                               "NAME=FILE each: answers of evaluate.py policy, or AlpacaEval's outputs")
    judge_model: str = HfArg(default="gpt-4o-2024-08-06", help="the judge (paper: this one)")
    judge_url: str = HfArg(default="https://api.openai.com/v1", help="its address; the key: $OPENAI_API_KEY")
    output: str = HfArg(default="runs/atlas/judge", help="folder for judge.json and the verdicts")
    overwrite: bool = HfArg(default=False, help="replace judge.json, verdicts.jsonl, never the replies")
    dry_run: bool = HfArg(default=False, help="say how many requests and tokens it takes, and stop")
    concurrency: int = HfArg(default=8, help="requests under way at a time")
    seed: int = HfArg(default=1, help="seed of the order of requests and of the bootstrap")


def judge_messages(prompt, response):
    """Appendix I: the rubric as system prompt, one question and one response as user prompt."""
    if not isinstance(prompt, str):                           # chat messages
        turns = [message["content"] if len(prompt) == 1 else f"{message['role']}: {message['content']}"
                 for message in prompt]
        prompt = "\n".join(turns)
    return [{"role": "system", "content": RUBRIC},
            {"role": "user", "content": f"<Question>: {prompt}\n<response>: {response}"}]


def parse_verdict(text):
    """"Score: 4 Evaluation evidence: ..." -> 4; None for anything else: a verdict is read, not guessed. "4/5"
    and asterisks pass; a second score that differs, a fraction, or words in front do not."""
    text = text.replace("*", "").strip()
    verdict = re.match(r"Score:\s*([0-5])(?:\s*/\s*5)?[\s.,;]*Evaluation evidence:", text)
    scores = {float(score) for score in re.findall(r"Score:\s*(\d+(?:\.\d+)?)", text)}
    return int(verdict[1]) if verdict and len(scores) == 1 else None


def read_answers(files):
    """{model: {(prompt as JSON, number of the answer): response}}: the same keys, in one order, for all."""
    models = {}
    for entry in files:
        name, _, file = entry.rpartition("=")
        mine = {}
        for number, row in enumerate(read_json(file), 1):
            model = name or row.get("model") or row.get("generator")           # the latter: AlpacaEval's
            prompt = row.get("prompt") or row.get("instruction")
            response = row.get("response", row.get("output"))
            if not model or not prompt or response is None:
                fail(f"{file}: row {number} lacks a model, a prompt or a response")
            mine.setdefault(model, {}).setdefault(json.dumps(prompt), []).append(response)
        for model, answers in mine.items():
            if model in models:
                fail(f"--answers: two files have a model {model!r}. Name one: OTHER={file}")
            numbered = {prompt: enumerate(texts) for prompt, texts in answers.items()}
            models[model] = {(prompt, n): text for prompt in numbered for n, text in numbered[prompt]}
    first = next(iter(models))
    for other in models:
        if models[other].keys() != models[first].keys():
            fail(f"--answers: {first} and {other} have not answered the same prompts, or not as often")
    return {model: {key: answers[key] for key in models[first]} for model, answers in models.items()}


def ask(args, key, messages):
    """The text of one chat completion. After what may pass (no connection, 429, 5xx) it is asked again."""
    body = {"model": args.judge_model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    for attempt in range(TRIES):
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            url = f"{args.judge_url.rstrip('/')}/chat/completions"
            with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=60) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except HTTPError as error:
            text = error.read().decode(errors="replace")
            problem = f"HTTP {error.code}: {text}"
            if error.code == 400 and "content_filter" in text:                 # this answer's problem
                return ""
            if error.code < 500 and error.code not in (408, 409, 429):
                break
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            problem = repr(error)
    raise RuntimeError(problem.replace(key, "***")[:300])


def ask_all(args, jobs, replies, file):
    """Sends jobs, {identity: messages}, --concurrency at a time. A reply goes to replies and file at once."""
    key, lock = os.environ.get("OPENAI_API_KEY", "").strip(), threading.Lock()
    if not key:
        fail("the environment variable OPENAI_API_KEY is not set (a server that wants no key: any word)")

    def work(identity):
        text = ask(args, key, jobs[identity])
        with lock, open(file, "a", encoding="utf-8") as log:
            replies[identity] = text
            log.write("\n" + json.dumps({"request": identity, "text": text}))  # the last may be half written

    pool = ThreadPoolExecutor(args.concurrency)
    try:
        futures = [pool.submit(work, identity) for identity in jobs]
        for future in tqdm(as_completed(futures), "judge", total=len(jobs)):
            future.result()
    except RuntimeError as problem:
        fail(f"{args.judge_url}: no answer ({problem}). What it has answered is kept")
    finally:                                                  # Ctrl-C too: what is under way is kept
        pool.shutdown(cancel_futures=True)


def main(args):
    models, output, replies = read_answers(args.answers), Path(args.output), {}
    file = output / "replies.jsonl"
    for name in () if args.dry_run else ("judge.json", "verdicts.jsonl"):
        new_file(output / name, args.overwrite)
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        try:
            reply = json.loads(line)
            replies[reply["request"]] = reply["text"]
        except ValueError:                                    # empty, or cut off when a run was stopped
            pass

    jobs, verdicts = {}, []                                   # equal answers are judged once
    for model, answers in models.items():
        for (prompt, _), response in answers.items():
            messages = judge_messages(json.loads(prompt), response)
            asked = json.dumps([args.judge_model, args.judge_url, messages])
            identity = hashlib.sha256(asked.encode()).hexdigest()
            line = {"model": model, "prompt": json.loads(prompt), "response": response, "request": identity}
            verdicts.append(line)
            if identity not in replies:
                jobs[identity] = messages
    order = random.Random(args.seed).sample(list(jobs), len(jobs))             # Appendix I: randomized
    jobs = {identity: jobs[identity] for identity in order}
    characters = sum(len(message["content"]) for messages in jobs.values() for message in messages)
    print(f"{len(verdicts)} answers of {len(models)} models; {len(jobs)} requests to make, with about "
          f"{characters // 4:,} tokens in (4 characters each) and at most {MAX_TOKENS * len(jobs):,} out")
    if args.dry_run:
        return None
    if jobs:
        ask_all(args, jobs, replies, file)

    for line in verdicts:
        line["verdict"] = replies[line.pop("request")]
        line["score"] = parse_verdict(line["verdict"])
    result, scores = {"judge_model": args.judge_model, "models": {}, "unjudged": 0}, {}
    for model in models:
        mine = [line for line in verdicts if line["model"] == model]
        read = [line for line in mine if line["score"] is not None]
        points, prompts = [line["score"] for line in read], [json.dumps(line["prompt"]) for line in read]
        scores[model] = torch.tensor([math.nan if line["score"] is None else line["score"] for line in mine])
        result["unjudged"] += len(mine) - len(read)
        result["models"][model] = {"answers": len(mine), "unreadable": len(mine) - len(read),
                                   "score": bootstrap(points, args.seed, prompts) if points else None,
                                   "points": {str(n): points.count(n) for n in range(6)}}
    result["outcomes"] = outcomes(scores)                     # pairs with an unreadable verdict do not count
    for model, x in result["models"].items():
        print(f"{model}: {x}")
        for other, y in result["outcomes"][model].items():
            print(f"  against {other}: wins {y['win']:.1%}, ties {y['tie']:.1%}, loses {y['lose']:.1%}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts)
    (output / "verdicts.jsonl").write_text(text, encoding="utf-8")
    (output / "judge.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


if __name__ == "__main__":
    main(parse_args(Args, sys.argv[1:]))
