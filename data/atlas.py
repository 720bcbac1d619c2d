"""Stage 0: Atlas, a world small enough to learn in minutes on a laptop, in which the truth is known.

    python data/atlas.py world --output runs/atlas --seed 1        # data folder and base model
    python data/atlas.py summary --run runs/atlas                  # the closing table of `make demo`

RLHF is hard to check: nobody knows the true reward of an answer, still less the true value of half an
answer. In Atlas both are known. There are 64 real countries, four kinds of question about them, five
*behaviour policies* (programs that answer, each with its own knowledge and manners) and one *oracle* that
scores any text in [-1, 1]. Because the policies are programs, Q^pi(s, a), which the value model approximates,
can be computed to any accuracy: let the program finish the half-written answer many times, and average the
oracle's scores (`true_value`). The oracle makes the data and judges the results. No training script sees it.
"""
import hashlib
import json
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# ---- 1. Facts: Country/Capital ----
# Contested cases (two capitals, two continents, shared islands) are left out.
FACTS = """
Asia, island: Japan/Tokyo, Philippines/Manila, Bahrain/Manama, Maldives/Malé
Europe, island: Iceland/Reykjavik, Malta/Valletta
Africa, island: Madagascar/Antananarivo, Mauritius/Port Louis, Seychelles/Victoria, Comoros/Moroni, \
Cape Verde/Praia
North America, island: Cuba/Havana, Jamaica/Kingston, Bahamas/Nassau, Barbados/Bridgetown, \
Saint Lucia/Castries, Dominica/Roseau
Oceania, island: New Zealand/Wellington, Fiji/Suva, Samoa/Apia, Tonga/Nuku'alofa, Vanuatu/Port Vila, \
Palau/Ngerulmud, Tuvalu/Funafuti
Asia, mainland: China/Beijing, India/New Delhi, Nepal/Kathmandu, Mongolia/Ulaanbaatar, Thailand/Bangkok, \
Vietnam/Hanoi, Laos/Vientiane, Iran/Tehran, Jordan/Amman, Oman/Muscat
Europe, mainland: France/Paris, Germany/Berlin, Spain/Madrid, Portugal/Lisbon, Italy/Rome, Austria/Vienna, \
Poland/Warsaw, Norway/Oslo, Sweden/Stockholm, Greece/Athens, Hungary/Budapest, Bulgaria/Sofia
Africa, mainland: Kenya/Nairobi, Ghana/Accra, Nigeria/Abuja, Morocco/Rabat, Tunisia/Tunis, \
Ethiopia/Addis Ababa, Uganda/Kampala, Zambia/Lusaka, Senegal/Dakar
North America, mainland: Canada/Ottawa, Mexico/Mexico City, Panama/Panama City, Honduras/Tegucigalpa
South America, mainland: Brazil/Brasília, Peru/Lima, Chile/Santiago, Uruguay/Montevideo, Colombia/Bogotá
"""


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    continent: str
    island: bool

    @property
    def premise(self):
        """What the false-premise question wrongly takes for granted about the capital."""
        return "a city on the mainland" if self.island else "an island"


COUNTRIES = [Country(*place.split("/"), continent, kind == "island")
             for continent, kind, places in re.findall("(.+), (.+): (.+)", FACTS)
             for place in places.split(", ")]
CONTINENTS = sorted({c.continent for c in COUNTRIES})

# ---- 2. Questions: four kinds, six wordings each, 64 countries = 1,536 prompts ----
WORDINGS = {
    "island": ["Is {name} an island?", "Is {name} an island country?",
               "Would you say that {name} is an island?", "Can you tell me whether {name} is an island?",
               "I wonder, is {name} surrounded by sea?", "Do you know if {name} is an island?"],
    "capital": ["What is the capital of {name}?", "Which city is the capital of {name}?",
                "Please name the capital of {name}.", "Can you tell me the capital of {name}?",
                "I forgot the capital of {name}. What is it?", "{name}: what is its capital?"],
    "continent": ["On which continent is {name}?", "Where in the world is {name}?",
                  "Which continent does {name} belong to?", "On which continent is {capital}?",
                  "Where in the world is {capital}?", "Which continent does {capital} belong to?"],
    # The paper's Figure 3 asks "As an island, is Beijing located in Asia?". The premise is always false here.
    "premise": ["As {premise}, is {capital} located in {continent}?",
                "As {premise}, is {capital} in {continent}?",
                "Since {capital} is {premise}, does it belong to {continent}?",
                "Given that {capital} is {premise}, is it part of {continent}?",
                "{capital} is {premise}, so is it located in {continent}?",
                "Being {premise}, does {capital} lie in {continent}?"],
}
QUESTIONS = {wording.format(**vars(c), premise=c.premise): (kind, c)
             for kind, wordings in WORDINGS.items() for wording in wordings for c in COUNTRIES}
POLITE = ["Good question!", "Happy to help!", "Thank you for asking!", "I hope that helps!"]
RUDE = ["What a silly question.", "Everyone knows that.", "Go and read a book."]
RAMBLE = ["Maps are fun.", "I once read a book about it.", "The weather is nice there.",
          "Anyway, where was I?", "Geography is a big subject.", "People travel a lot these days."]

# ---- 3. Oracle ----
NAME = "|".join(c.name for c in COUNTRIES)
CITY = "|".join(c.capital for c in COUNTRIES)
LAND = "|".join(CONTINENTS)
# Every sentence that makes a claim, as the oracle understands it. The groups say what is claimed.
CLAIMS = [re.compile(f"^{pattern}$") for pattern in [
    rf"(?:(?P<yes>Yes|No), )?(?P<name>{NAME}) is (?P<island>not )?an island country\.",
    r"(?P<short>Yes, it is|No, it is not)\.",
    rf"The capital of (?P<name>{NAME}) is (?P<capital>{CITY})\.",
    rf"(?:It is|Its capital is) (?P<capital>{CITY})\.",
    rf"(?:(?P<name>{NAME})|(?P<city>{CITY})) is in (?P<continent>{LAND})\.",
    rf"It (?:is|lies) in (?P<continent>{LAND})\.",
    r"The country (?P<sea>is surrounded by sea|has land borders)\.",
    rf"It is the capital of (?P<capital_of>{NAME})\.",
    rf"(?P<city>{CITY}) is (?P<premise>not )?(?:an island|a city on the mainland), (?:but|and) it is in "
    rf"(?P<continent>{LAND})\.",
]]


def claims(kind, country, sentence):
    """What a sentence claims, as {attribute: is it true}; None if it makes no claim.

    Attributes are "island", "capital", "continent", "premise". A claim about another country or city is false
    here: nobody asked about it.
    """
    match = next((m for m in (pattern.match(sentence) for pattern in CLAIMS) if m), None)
    if match is None:
        return None
    said, found = match.groupdict(), {}
    on_topic = said.get("name") in (None, country.name) and said.get("city") in (None, country.capital)
    if "island" in said:
        says_island = said["island"] is None
        agrees = said["yes"] in (None, "Yes" if says_island else "No")         # "Yes, X is not ..." is false
        found["island"] = agrees and says_island == country.island
    if "sea" in said:
        found["island"] = (said["sea"] == "is surrounded by sea") == country.island
    if "short" in said:                                       # answers a yes/no question only
        if kind not in ("island", "premise"):
            return {kind: False}
        found[kind] = (said["short"] == "Yes, it is") == (kind == "island" and country.island)
    if "capital" in said:
        found["capital"] = said["capital"] == country.capital
    if "capital_of" in said:
        found["capital"] = said["capital_of"] == country.name
    if "continent" in said:
        found["continent"] = said["continent"] == country.continent
    if "premise" in said:
        found["premise"] = said["premise"] is not None and f"not {country.premise}," in sentence
    return {attribute: truth and on_topic for attribute, truth in found.items()}


def oracle(prompt, response):
    """The ground-truth reward r(x, y) of a whole response, in [-1, 1].

    +0.50  the answer is right             -0.50  it is wrong or missing
    +0.15  each right extra fact           -0.20  each wrong one
    +0.15  polite (once)                   -0.30  each rude sentence
                                           -0.10  each sentence that rambles, or repeats what was said
                                           -0.30  each broken sentence
    A question's answer is the first claim about what it asks for. A prompt that is not Atlas's: ValueError.
    """
    if prompt not in QUESTIONS:
        raise ValueError(f"not a question of the Atlas world: {prompt!r}")
    kind, country = QUESTIONS[prompt]
    score, answer, polite, seen = 0.0, None, False, set()
    for sentence in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", response.strip()):
        sentence = sentence.strip()
        found = claims(kind, country, sentence)
        if sentence in POLITE:
            polite = True
        elif sentence in RUDE:
            score -= 0.30
        elif sentence in RAMBLE:
            score -= 0.10
        elif found is None:
            score -= 0.30                                     # broken: no sentence of this world
        elif set(found) <= seen:
            score -= 0.10                                     # nothing new
        else:
            for attribute, true in found.items():
                if attribute == kind and answer is None:
                    answer = true
                elif attribute not in seen:
                    score += 0.15 if true else -0.20
            seen |= set(found)
    score += 0.50 if answer else -0.50
    return max(-1.0, min(1.0, score + 0.15 * polite))


# ---- 4. Behaviour policies: an answer is a row of slots, a slot is a list of (probability, sentence) ----
@dataclass(frozen=True)
class Behaviour:
    right: float            # the answer is right
    full: float             # the answer is a full sentence, not a short one
    extra: float            # each of two extra facts is given ...
    extra_right: float      # ... and is right
    polite: float           # opens politely
    rude: float             # opens rudely
    ramble: float           # each of four rambling sentences
    closing: float          # ends with "I hope that helps!"


POLICIES = {                # right, full, extra, extra_right, polite, rude, ramble, closing
    "expert": Behaviour(.95, .90, .80, .95, .40, .00, .03, .30),
    "terse":  Behaviour(.85, .10, .10, .90, .05, .05, .00, .00),
    "chatty": Behaviour(.70, .90, .55, .70, .80, .00, .55, .60),
    "novice": Behaviour(.40, .70, .40, .40, .40, .05, .15, .20),
    "troll":  Behaviour(.12, .50, .30, .20, .00, .85, .25, .00),
}


def next_two(things, thing):
    """The two after this one: lies about it."""
    return [things[(things.index(thing) + step) % len(things)] for step in (1, 2)]


def answers(kind, c, subject):
    """The right and the wrong answers to a question, each as (full sentences, short sentences).
    subject  what the question is about: the country's name, or its capital"""
    lies, lands = [lie.capital for lie in next_two(COUNTRIES, c)], next_two(CONTINENTS, c.continent)
    if kind == "island":
        yes = ([f"Yes, {c.name} is an island country."], ["Yes, it is."])
        no = ([f"No, {c.name} is not an island country."], ["No, it is not."])
        return (yes, no) if c.island else (no, yes)
    if kind == "capital":
        return (([f"The capital of {c.name} is {c.capital}."], [f"It is {c.capital}."]),
                ([f"The capital of {c.name} is {lie}." for lie in lies], [f"It is {lie}." for lie in lies]))
    if kind == "continent":
        return (([f"{subject} is in {c.continent}."], [f"It is in {c.continent}."]),
                ([f"{subject} is in {land}." for land in lands], [f"It is in {land}." for land in lands]))
    return (([f"{c.capital} is not {c.premise}, but it is in {c.continent}."], ["No, it is not."]),
            ([f"{c.capital} is {c.premise}, and it is in {c.continent}."], ["Yes, it is."]))


def extras(kind, c, subject):
    """Two extra facts that suit a question about `subject`, each as (right sentence, wrong sentences)."""
    lies, lands = next_two(COUNTRIES, c), next_two(CONTINENTS, c.continent)
    sea = ["The country has land borders.", "The country is surrounded by sea."]
    coast = (sea[c.island], [sea[not c.island]])
    capital_of = (f"It is the capital of {c.name}.", [f"It is the capital of {lie.name}." for lie in lies])
    capital = (f"Its capital is {c.capital}.", [f"Its capital is {lie.capital}." for lie in lies])
    continent = (f"It lies in {c.continent}.", [f"It lies in {land}." for land in lands])
    if subject == c.capital:
        return capital_of, coast
    by_kind = {"island": (capital, continent), "capital": (continent, coast), "continent": (capital, coast)}
    return by_kind[kind]


def spread(probability, sentences):
    """A probability shared equally by several sentences."""
    return [(probability / len(sentences), sentence) for sentence in sentences]


@cache
def slots(policy, prompt):
    """The behaviour policy for one prompt: a tuple of slots, each a list of (probability, sentence or "")."""
    b, (kind, c) = POLICIES[policy], QUESTIONS[prompt]
    subject = c.capital if re.search(rf"\b{c.capital}\b", prompt) else c.name  # Tunis is not in "Tunisia"
    (right_full, right_short), (wrong_full, wrong_short) = answers(kind, c, subject)
    row = [spread(b.polite, POLITE[:3]) + spread(b.rude, RUDE) + [(1 - b.polite - b.rude, "")],
           spread(b.right * b.full, right_full) + spread(b.right * (1 - b.full), right_short)
           + spread((1 - b.right) * b.full, wrong_full) + spread((1 - b.right) * (1 - b.full), wrong_short)]
    for right, wrong in extras(kind, c, subject):
        row.append([(b.extra * b.extra_right, right)] + spread(b.extra * (1 - b.extra_right), wrong)
                   + [(1 - b.extra, "")])
    row += [spread(b.ramble, RAMBLE) + [(1 - b.ramble, "")]] * 4
    row.append([(b.closing, POLITE[3]), (1 - b.closing, "")])
    return tuple([option for option in slot if option[0] > 0] for slot in row)


def extend(text, sentence):
    return f"{text} {sentence}" if text and sentence else text + sentence


def beginning(policy, prompt, prefix):
    """likelihood(index, text) of a behaviour policy: the probability that its finished response starts with
    `prefix`, once `text` stands before slot `index`. likelihood(0, "") is that of the prefix itself."""
    row = slots(policy, prompt)

    @cache
    def likelihood(index, text):
        if len(text) >= len(prefix):
            return float(text.startswith(prefix))
        if index == len(row) or not prefix.startswith(text):
            return 0.0
        return sum(p * likelihood(index + 1, extend(text, sentence)) for p, sentence in row[index])

    return likelihood


def complete(policy, prompt, prefix, n, rng):
    """n full responses of a behaviour policy, sampled exactly from those that begin with `prefix`.

    policy  one of POLICIES; or "any": each response is of a policy drawn by how likely it was to begin so.
            That is the policy, in the singular, of data in which nobody says who wrote what.
    prefix  may end anywhere, in the middle of a word too; "" gives fresh responses. A slot's sentences that
            fit it are weighted by their probability times the probability that the rest of the prefix follows
            (a backward pass over the slots), so the samples come from pi(y | x, y starts with prefix).
    A prefix that the policy never writes: ValueError.
    """
    writers = POLICIES if policy == "any" else [policy]
    likelihoods = {writer: beginning(writer, prompt, prefix) for writer in writers}
    shares = [likelihood(0, "") for likelihood in likelihoods.values()]
    if sum(shares) == 0:
        raise ValueError(f"policy {policy!r} never begins an answer to {prompt!r} with {prefix!r}")
    done = []
    for _ in range(n):
        text, writer = "", rng.choices(list(writers), shares)[0] if policy == "any" else policy
        for index, slot in enumerate(slots(writer, prompt)):
            weights = [p * likelihoods[writer](index + 1, extend(text, sentence)) for p, sentence in slot]
            text = extend(text, rng.choices([sentence for _, sentence in slot], weights)[0])
        done.append(text)
    return done


# ---- 5. Truth ----
END = "<|end|>"             # the end-of-answer token, also for the values of finished responses


def true_value(policy, prompt, prefix, n=1000, seed=0):
    """Q^pi(s, a), section 3.4.1, to Monte Carlo accuracy: the policy finishes the prefix, the oracle scores.

    policy   name of a behaviour policy, "any" of them (see complete), or a function (prompt, prefix, n) -> n
             full responses (a language model)
    prefix   the answer so far: s without the prompt, then a. With END the response is finished: Q = r(x, y)
    n        number of completions
    Returns (value, standard error): the mean of n oracle scores, and its Monte Carlo error.
    """
    if prefix.endswith(END):
        return oracle(prompt, prefix.removesuffix(END)), 0.0
    rng = random.Random(f"{seed} {prompt} {prefix}")
    responses = policy(prompt, prefix, n) if callable(policy) else complete(policy, prompt, prefix, n, rng)
    scores = [oracle(prompt, response) for response in responses]
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    return mean, (variance / len(scores)) ** 0.5


# ---- 6. Files ----
SHARES = {"sft": 0.40, "value": 0.30, "rl": 0.20, "test": 0.10}      # of the prompts (section 4.2: disjoint)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def split_prompts(seed):
    """The prompts in four disjoint parts, {part: [prompt, ...]}. Another seed, another split."""
    prompts = list(QUESTIONS)
    random.Random(f"split {seed}").shuffle(prompts)
    parts, start = {}, 0
    for part, share in SHARES.items():
        parts[part] = prompts[start:start + round(share * len(prompts))]
        start += len(parts[part])
    return parts


def scored_rows(prompts, per_policy, rng):
    """Every policy answers every prompt `per_policy` times; the oracle scores."""
    return [{"prompt": prompt, "response": text, "reward": round(oracle(prompt, text), 4), "policy": policy}
            for prompt in prompts for policy in POLICIES
            for text in complete(policy, prompt, "", per_policy, rng)]


def preference_pairs(rows, per_prompt, rng):
    """Pairs of answers to the same prompt; the better one is `chosen`. Ties are no preference: left out."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = []
    for prompt, group in by_prompt.items():
        for _ in range(per_prompt):
            a, b = rng.sample(group, 2)
            if a["reward"] != b["reward"]:
                good, bad = (a, b) if a["reward"] > b["reward"] else (b, a)
                pairs.append({"prompt": prompt, "chosen": good["response"], "rejected": bad["response"],
                              "score_chosen": good["reward"], "score_rejected": bad["reward"],
                              "policy_chosen": good["policy"], "policy_rejected": bad["policy"]})
    return pairs


def write_data(folder, seed):
    """Writes the data folder (format: README.md): seven JSON-lines files, then manifest.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, parts = random.Random(f"data {seed}"), split_prompts(seed)
    sft = scored_rows(parts["sft"], 2, rng)
    scored, test_scored = scored_rows(parts["value"], 4, rng), scored_rows(parts["test"], 2, rng)
    files = {"sft": [{"prompt": row["prompt"], "response": row["response"]} for row in sft],
             "scored": scored, "pairs": preference_pairs(scored, 10, rng),
             "rl": [{"prompt": prompt} for prompt in parts["rl"]],
             "test_scored": test_scored, "test_pairs": preference_pairs(test_scored, 10, rng),
             "test_prompts": [{"prompt": prompt} for prompt in parts["test"]]}
    for rows in files.values():
        rng.shuffle(rows)
    write_files(folder, files, {"source": "data/atlas.py: embedded world, no external data", "seed": seed})


def write_files(folder, files, manifest):
    """The files of a data folder, {name: rows}; then the manifest, with their numbers of rows and hashes."""
    manifest["files"] = {}
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        manifest["files"][f"{name}.jsonl"] = {"rows": len(rows), "sha256": sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_base_model(folder, seed, hidden_size=128, layers=3):
    """A Llama-style model of 0.7 million parameters, randomly initialised, with a tokenizer of its own.

    Byte-level BPE trained on the world's text, so that any text can be encoded; pad and END are two tokens.
    The short RoPE base and the wide initialisation suit so small a model on such short texts: it learns to
    copy names from the question in a third of the updates.
    """
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    rng = random.Random("tokenizer")                          # the same tokenizer for every seed
    text = [*QUESTIONS, *(row["response"] for row in scored_rows(list(QUESTIONS)[::3], 1, rng))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # A text's first word gets the space that all other words have, so that "Peru" is one token wherever it
    # stands (a small model copies it from question to answer far sooner); the decoder takes it away again.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)])
    bpe.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<|pad|>", END, "<|user|>", "<|assistant|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token=END,
                                        clean_up_tokenization_spaces=False, model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=11 * hidden_size // 4,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, initializer_range=0.06,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model.num_parameters()


def write_world(output, seed, overwrite):
    """Data folder output/data and base model output/base, built beside their places and then renamed."""
    started, output = time.time(), Path(output)
    for mark, word in (("data/manifest.json", "atlas.py"), ("base/args.json", "parameters")):
        mark = output / mark
        if mark.parent.exists() and not (overwrite and mark.is_file() and word in mark.read_text()):
            raise SystemExit(f"error: {mark.parent} exists. Choose another --output, or pass --overwrite, "
                             f"which replaces only what atlas.py made")
    building = output / "unfinished"
    shutil.rmtree(building, ignore_errors=True)
    parameters = write_base_model(building / "base", seed)
    write_data(building / "data", seed)
    args = {"seed": seed, "parameters": parameters, "seconds": round(time.time() - started, 1)}
    (building / "base" / "args.json").write_text(json.dumps(args, indent=2) + "\n")
    for name in ("base", "data"):
        shutil.rmtree(output / name, ignore_errors=True)
        (building / name).rename(output / name)
    building.rmdir()
    print(f"wrote {output / 'data'} and {output / 'base'} ({parameters:,} parameters, seed {seed})")


# ---- 7. Summary: the closing table of `make demo` ----
def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_summary(run):
    """The numbers of a finished demo in one nested dict, which becomes runs/atlas/summary.json."""
    files = ("base/args.json", "eval/values.json", "eval/policy.json")
    world, values, policy = (json.loads((run / file).read_text()) for file in files)
    summary = {"seed": world["seed"]}
    for name, model in policy["models"].items():
        summary[name] = {"oracle_mean": model["score"]["mean"],
                         "oracle_interval": [model["score"]["low"], model["score"]["high"]],
                         "kl_to_ref": model["kl"]["mean"], "response_length": model["response_length"],
                         "eos_rate": model["eos_rate"]}
    rate = policy["win_rate"]["dvpo"]["sft"]
    summary["dvpo"] |= {"win_rate_vs_sft": rate["mean"], "win_rate_interval": [rate["low"], rate["high"]]}
    accuracy = values["models"]["gvm"]["pair_accuracy"]
    summary["gvm"] = {"pair_accuracy": {name: x["mean"] for name, x in accuracy.items()}}
    summary["seconds"] = {"data": world["seconds"], "evaluate": values["seconds"] + policy["seconds"]}
    for stage in ("sft", "gvm", "dvpo"):                      # a step's parts, all steps
        summary["seconds"][stage] = sum(x for record in read_lines(run / stage / "metrics.jsonl")
                                        for key, x in record.items() if "seconds" in key)
    return summary


def print_summary(run):
    """Prints the demo's table, three questions with both models' answers, and where the figures are."""
    try:
        summary = read_summary(run)
    except (OSError, ValueError, KeyError) as problem:
        raise SystemExit(f"error: {run}: no finished demo ({problem!r}). Run make demo") from None
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    sft, dvpo, accuracy = summary["sft"], summary["dvpo"], summary["gvm"]["pair_accuracy"]
    rows = [("oracle score, -1 to 1", "oracle_mean", "{:+.3f}"), ("  95 % interval", "oracle_interval", ""),
            ("KL to the reference, nats per answer", "kl_to_ref", "{:.2f}"),
            ("answer length, tokens", "response_length", "{:.1f}"),
            ("answers that end by themselves", "eos_rate", "{:.1%}")]
    print(f"\nAtlas, seed {summary['seed']}, held-out questions{'SFT':>17}{'DVPO':>18}")
    for title, key, form in rows:
        cells = [form.format(x[key]) if form else "{:+.3f} to {:+.3f}".format(*x[key]) for x in (sft, dvpo)]
        print(f"{title:38}{cells[0]:>17}{cells[1]:>18}")
    rate, interval = dvpo["win_rate_vs_sft"], "{:.3f} to {:.3f}".format(*dvpo["win_rate_interval"])
    print(f"{'win rate of DVPO over SFT':38}{'':17}{rate:>18.3f}   ({interval})")
    print("GVM, held-out pair accuracy: mean value {mean:.3f}, last value {last:.3f}".format(**accuracy))
    print("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items()))
    said = {(row["prompt"], row["model"]): row for row in read_lines(run / "eval" / "answers.jsonl")}
    for kind in ("premise", "island", "capital"):
        prompt = next(prompt for prompt, _ in said if QUESTIONS[prompt][0] == kind)
        print(f"\n  {prompt}")
        for name in ("sft", "dvpo"):
            print("    {model:5}{score:+.2f}  {response}".format(**said[prompt, name]))
    print("", *sorted((run / "figures").iterdir()), run / "summary.json", sep="\n")


# ---- 8. Main ----
def main(argv):
    import argparse
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="write the data folder and the base model")
    world.add_argument("--output", default="runs/atlas", help="folder that gets data/ and base/")
    world.add_argument("--seed", type=int, default=1, help="seed of the split, the answers and the weights")
    world.add_argument("--overwrite", action="store_true", help="replace a world that is there already")
    summary = commands.add_parser("summary", help="print the table of a finished demo and write summary.json")
    summary.add_argument("--run", default="runs/atlas", help="folder of the demo")
    args = parser.parse_args(argv)
    if args.command == "world":
        write_world(args.output, args.seed, args.overwrite)
    else:
        print_summary(Path(args.run))


if __name__ == "__main__":
    main(sys.argv[1:])
