"""Stage 0: Atlas, a world small enough to learn in a minute on two CPU cores, in which the truth is known.

    python atlas.py world --output runs/atlas --seed 1        # data folder and base model
    python atlas.py summary --run runs/atlas                  # the closing table of `make demo`

RLHF is hard to check: the true reward of an answer and, more so, the true value of half an answer are unknown. In
Atlas both are known. 64 real countries, four kinds of question about them, five *behaviour policies* (programs that
answer, each with its own knowledge and manners) and one *oracle* that scores any text in [-1, 1]. Because the
policies are programs, Q^pi(s, a), which the paper's value model approximates, can be computed to any accuracy: take
the half-written answer, let the program finish it many times, average the oracle's scores (`true_value`).

The oracle makes the offline data and judges the results. No training script ever sees it.
"""
# ---- contents ----  1. Facts  2. Questions  3. Oracle  4. Behaviour policies  5. Truth  6. Files  7. Summary  8. Main
import hashlib
import json
import random
import re
import shlex
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# ---- 1. Facts ----
# country, capital, continent, island? Contested cases (two capitals, two continents, shared islands) are left out.
FACTS = [tuple(field.strip() for field in line.split(",")) for line in """
Japan, Tokyo, Asia, island
Philippines, Manila, Asia, island
Bahrain, Manama, Asia, island
Maldives, Malé, Asia, island
Iceland, Reykjavik, Europe, island
Malta, Valletta, Europe, island
Madagascar, Antananarivo, Africa, island
Mauritius, Port Louis, Africa, island
Seychelles, Victoria, Africa, island
Comoros, Moroni, Africa, island
Cape Verde, Praia, Africa, island
Cuba, Havana, North America, island
Jamaica, Kingston, North America, island
Bahamas, Nassau, North America, island
Barbados, Bridgetown, North America, island
Saint Lucia, Castries, North America, island
Dominica, Roseau, North America, island
New Zealand, Wellington, Oceania, island
Fiji, Suva, Oceania, island
Samoa, Apia, Oceania, island
Tonga, Nuku'alofa, Oceania, island
Vanuatu, Port Vila, Oceania, island
Palau, Ngerulmud, Oceania, island
Tuvalu, Funafuti, Oceania, island
China, Beijing, Asia, mainland
India, New Delhi, Asia, mainland
Nepal, Kathmandu, Asia, mainland
Mongolia, Ulaanbaatar, Asia, mainland
Thailand, Bangkok, Asia, mainland
Vietnam, Hanoi, Asia, mainland
Laos, Vientiane, Asia, mainland
Iran, Tehran, Asia, mainland
Jordan, Amman, Asia, mainland
Oman, Muscat, Asia, mainland
France, Paris, Europe, mainland
Germany, Berlin, Europe, mainland
Spain, Madrid, Europe, mainland
Portugal, Lisbon, Europe, mainland
Italy, Rome, Europe, mainland
Austria, Vienna, Europe, mainland
Poland, Warsaw, Europe, mainland
Norway, Oslo, Europe, mainland
Sweden, Stockholm, Europe, mainland
Greece, Athens, Europe, mainland
Hungary, Budapest, Europe, mainland
Bulgaria, Sofia, Europe, mainland
Kenya, Nairobi, Africa, mainland
Ghana, Accra, Africa, mainland
Nigeria, Abuja, Africa, mainland
Morocco, Rabat, Africa, mainland
Tunisia, Tunis, Africa, mainland
Ethiopia, Addis Ababa, Africa, mainland
Uganda, Kampala, Africa, mainland
Zambia, Lusaka, Africa, mainland
Senegal, Dakar, Africa, mainland
Canada, Ottawa, North America, mainland
Mexico, Mexico City, North America, mainland
Panama, Panama City, North America, mainland
Honduras, Tegucigalpa, North America, mainland
Brazil, Brasília, South America, mainland
Peru, Lima, South America, mainland
Chile, Santiago, South America, mainland
Uruguay, Montevideo, South America, mainland
Colombia, Bogotá, South America, mainland
""".strip().splitlines()]


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


COUNTRIES = [Country(name, capital, continent, kind == "island") for name, capital, continent, kind in FACTS]
CONTINENTS = sorted({c.continent for c in COUNTRIES})

# ---- 2. Questions: four kinds, six wordings each, 64 countries = 1,536 prompts ----
WORDINGS = {
    "island": ["Is {name} an island?", "Is {name} an island country?", "Would you say that {name} is an island?",
               "Can you tell me whether {name} is an island?", "I wonder, is {name} surrounded by sea?",
               "Do you know if {name} is an island?"],
    "capital": ["What is the capital of {name}?", "Which city is the capital of {name}?",
                "Please name the capital of {name}.", "Can you tell me the capital of {name}?",
                "I forgot the capital of {name}. What is it?", "{name}: what is its capital?"],
    "continent": ["On which continent is {name}?", "Where in the world is {name}?",
                  "Which continent does {name} belong to?", "On which continent is {capital}?",
                  "Where in the world is {capital}?", "Which continent does {capital} belong to?"],
    # The paper's Figure 3 asks "As an island, is Beijing located in Asia?". The premise is always false here.
    "premise": ["As {premise}, is {capital} located in {continent}?", "As {premise}, is {capital} in {continent}?",
                "Since {capital} is {premise}, does it belong to {continent}?",
                "Given that {capital} is {premise}, is it part of {continent}?",
                "{capital} is {premise}, so is it located in {continent}?",
                "Being {premise}, does {capital} lie in {continent}?"],
}
QUESTIONS = {wording.format(name=c.name, capital=c.capital, continent=c.continent, premise=c.premise): (kind, c)
             for kind, wordings in WORDINGS.items() for wording in wordings for c in COUNTRIES}
POLITE = ["Good question!", "Happy to help!", "Thank you for asking!", "I hope that helps!"]
RUDE = ["What a silly question.", "Everyone knows that.", "Go and read a book."]
RAMBLE = ["Maps are fun.", "I once read a book about it.", "The weather is nice there.", "Anyway, where was I?",
          "Geography is a big subject.", "People travel a lot these days."]

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

    Attributes are "island", "capital", "continent", "premise". A claim about another country or city is false here:
    nobody asked about it.
    """
    match = next((m for m in (pattern.match(sentence) for pattern in CLAIMS) if m), None)
    if match is None:
        return None
    said = {key: value for key, value in match.groupdict().items() if key in match.re.groupindex}
    on_topic = said.get("name") in (None, country.name) and said.get("city") in (None, country.capital)
    found = {}
    if "island" in said:
        says_island = said["island"] is None
        agrees = said["yes"] is None or (said["yes"] == "Yes") == says_island      # "Yes, X is not ..." is no answer
        found["island"] = agrees and says_island == country.island
    if "sea" in said:
        found["island"] = (said["sea"] == "is surrounded by sea") == country.island
    if "short" in said:                                                            # answers a yes/no question only
        yes = said["short"] == "Yes, it is"
        if kind not in ("island", "premise"):
            return {kind: False}
        found[kind] = yes == country.island if kind == "island" else not yes
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
    A question's answer is the first claim about what it asks for. Raises ValueError for a prompt that is not Atlas's.
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
            score -= 0.30                                  # broken: no sentence of this world
        elif set(found) <= seen:
            score -= 0.10                                  # nothing new
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


POLICIES = {
    "expert": Behaviour(right=.95, full=.90, extra=.80, extra_right=.95, polite=.40, rude=.00, ramble=.03, closing=.30),
    "terse":  Behaviour(right=.85, full=.10, extra=.10, extra_right=.90, polite=.05, rude=.05, ramble=.00, closing=.00),
    "chatty": Behaviour(right=.70, full=.90, extra=.55, extra_right=.70, polite=.80, rude=.00, ramble=.55, closing=.60),
    "novice": Behaviour(right=.40, full=.70, extra=.40, extra_right=.40, polite=.40, rude=.05, ramble=.15, closing=.20),
    "troll":  Behaviour(right=.12, full=.50, extra=.30, extra_right=.20, polite=.00, rude=.85, ramble=.25, closing=.00),
}


def answers(kind, c, subject):
    """The right and the wrong answers to a question, each as (full sentences, short sentences).

    subject  what the question is about: the country's name, or its capital
    """
    lies = [COUNTRIES[(COUNTRIES.index(c) + step) % len(COUNTRIES)].capital for step in (1, 2)]
    elsewhere = [CONTINENTS[(CONTINENTS.index(c.continent) + step) % len(CONTINENTS)] for step in (1, 2)]
    if kind == "island":
        yes = ([f"Yes, {c.name} is an island country."], ["Yes, it is."])
        no = ([f"No, {c.name} is not an island country."], ["No, it is not."])
        return (yes, no) if c.island else (no, yes)
    if kind == "capital":
        return (([f"The capital of {c.name} is {c.capital}."], [f"It is {c.capital}."]),
                ([f"The capital of {c.name} is {lie}." for lie in lies], [f"It is {lie}." for lie in lies]))
    if kind == "continent":
        return (([f"{subject} is in {c.continent}."], [f"It is in {c.continent}."]),
                ([f"{subject} is in {land}." for land in elsewhere], [f"It is in {land}." for land in elsewhere]))
    return (([f"{c.capital} is not {c.premise}, but it is in {c.continent}."], ["No, it is not."]),
            ([f"{c.capital} is {c.premise}, and it is in {c.continent}."], ["Yes, it is."]))


def extras(kind, c, subject):
    """Two extra facts that suit a question about `subject`, each as (right sentence, wrong sentences)."""
    lies = [COUNTRIES[(COUNTRIES.index(c) + step) % len(COUNTRIES)] for step in (1, 2)]
    sea = ["The country has land borders.", "The country is surrounded by sea."]
    capital = (f"Its capital is {c.capital}.", [f"Its capital is {lie.capital}." for lie in lies])
    capital_of = (f"It is the capital of {c.name}.", [f"It is the capital of {lie.name}." for lie in lies])
    elsewhere = [CONTINENTS[(CONTINENTS.index(c.continent) + step) % len(CONTINENTS)] for step in (1, 2)]
    continent = (f"It lies in {c.continent}.", [f"It lies in {land}." for land in elsewhere])
    coast = (sea[c.island], [sea[not c.island]])
    if subject == c.capital:
        return capital_of, coast
    return {"island": (capital, continent), "capital": (continent, coast), "continent": (capital, coast)}[kind]


def spread(probability, sentences):
    """A probability shared equally by several sentences."""
    return [(probability / len(sentences), sentence) for sentence in sentences]


@cache
def slots(policy, prompt):
    """The behaviour policy for one prompt: a tuple of slots, each a list of (probability, sentence or "")."""
    b, (kind, c) = POLICIES[policy], QUESTIONS[prompt]
    subject = c.capital if re.search(rf"\b{c.capital}\b", prompt) else c.name      # Tunis is not in "Tunisia"
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
    """likelihood(index, text) of a behaviour policy: the probability that its finished response starts with `prefix`,
    once `text` stands before slot `index`. likelihood(0, "") is that of the prefix itself."""
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

    policy  one of POLICIES; or "any": each response is of a policy of its own, drawn from all of them by how likely
            they were to begin so. That is the policy, in the singular, of data in which nobody says who wrote what.
    prefix  may end anywhere, in the middle of a word too; "" gives fresh responses. A slot's sentences that fit it are
            weighted by their probability times the probability that the rest of the prefix follows (a backward pass
            over the slots), so the samples come from pi(y | x, y starts with prefix).
    Raises ValueError if the policy could never write this prefix.
    """
    likelihoods = {name: beginning(name, prompt, prefix) for name in (POLICIES if policy == "any" else [policy])}
    shares = [likelihood(0, "") for likelihood in likelihoods.values()]
    if sum(shares) == 0:
        raise ValueError(f"policy {policy!r} never begins an answer to {prompt!r} with {prefix!r}")
    done = []
    for _ in range(n):
        writer = rng.choices(list(likelihoods), shares)[0] if policy == "any" else policy
        text = ""
        for index, slot in enumerate(slots(writer, prompt)):
            weights = [p * likelihoods[writer](index + 1, extend(text, sentence)) for p, sentence in slot]
            text = extend(text, rng.choices([sentence for _, sentence in slot], weights)[0])
        done.append(text)
    return done


# ---- 5. Truth ----
END = "<|end|>"             # the end-of-sequence token, also for the values of finished responses


def true_value(policy, prompt, prefix, n=1000, seed=0):
    """Q^pi(s, a), section 3.4.1, to Monte Carlo accuracy: the policy finishes the prefix n times, the oracle scores.

    policy   name of a behaviour policy, "any" of them (see complete), or a function (prompt, prefix, n) -> n full
             responses (a language model)
    prefix   the answer so far: s without the prompt, then a. If it ends with END the response is finished: Q = r(x, y)
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
SHARES = {"sft": 0.40, "value": 0.30, "rl": 0.20, "test": 0.10}      # of the prompts: disjoint, as in section 4.2
CHAT_TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
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
    return [{"prompt": prompt, "response": response, "reward": round(oracle(prompt, response), 4), "policy": policy}
            for prompt in prompts for policy in POLICIES for response in complete(policy, prompt, "", per_policy, rng)]


def preference_pairs(rows, per_prompt, rng):
    """Pairs of answers to the same prompt; the better one is `chosen`. Ties are no preference and are left out."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = []
    for prompt, group in by_prompt.items():
        for _ in range(per_prompt):
            a, b = rng.sample(group, 2)
            if a["reward"] != b["reward"]:
                chosen, rejected = (a, b) if a["reward"] > b["reward"] else (b, a)
                pairs.append({"prompt": prompt, "chosen": chosen["response"], "rejected": rejected["response"],
                              "score_chosen": chosen["reward"], "score_rejected": rejected["reward"],
                              "policy_chosen": chosen["policy"], "policy_rejected": rejected["policy"]})
    return pairs


def write_data(folder, seed):
    """Writes the data folder (format: README.md): seven JSON-lines files and manifest.json. Deterministic per seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, parts = random.Random(f"data {seed}"), split_prompts(seed)
    sft = [{"prompt": row["prompt"], "response": row["response"]} for row in scored_rows(parts["sft"], 2, rng)]
    scored, test_scored = scored_rows(parts["value"], 4, rng), scored_rows(parts["test"], 2, rng)
    files = {"sft": sft, "scored": scored, "pairs": preference_pairs(scored, 10, rng),
             "rl": [{"prompt": prompt} for prompt in parts["rl"]],
             "test_scored": test_scored, "test_pairs": preference_pairs(test_scored, 10, rng),
             "test_prompts": [{"prompt": prompt} for prompt in parts["test"]]}
    manifest = {"source": "atlas.py: embedded world, no external data", "seed": seed, "files": {}}
    for name, rows in files.items():
        rng.shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        manifest["files"][f"{name}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_base_model(folder, seed, hidden_size=128, layers=3):
    """A Llama-style model of 0.7 million parameters, randomly initialised, with a tokenizer of its own.

    Byte-level BPE trained on the world's text, so that any text can be encoded; pad and EOS are two different tokens.
    The short RoPE base and the wide initialisation suit so small a model on such short texts: it learns to copy names
    from the question in a third of the updates.
    """
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    rng = random.Random("tokenizer")                           # the same tokenizer for every seed
    text = [prompt for prompt in QUESTIONS] + [row["response"] for row in scored_rows(list(QUESTIONS)[::3], 1, rng)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # A text's first word gets the space that all other words have, so that "Peru" is one token wherever it stands
    # (a small model copies it from question to answer far sooner); the decoder takes that space away again.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)])
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
    """Data folder output/data and base model output/base. Both are built beside their place and then renamed."""
    import shutil
    started = time.time()
    output = Path(output)
    for name, mark, word in (("data", "manifest.json", "atlas.py"), ("base", "args.json", "parameters")):
        folder = output / name
        if folder.exists() and not overwrite:
            raise SystemExit(f"error: {folder} exists already: choose another --output, or pass --overwrite")
        if folder.exists() and not ((folder / mark).is_file() and word in (folder / mark).read_text()):
            raise SystemExit(f"error: {folder} was not made by atlas.py: --overwrite will not delete it")
    building = output / ".building"
    shutil.rmtree(building, ignore_errors=True)
    parameters = write_base_model(building / "base", seed)
    write_data(building / "data", seed)
    (building / "base" / "args.json").write_text(json.dumps(
        {"seed": seed, "parameters": parameters, "seconds": round(time.time() - started, 1)}, indent=2) + "\n")
    base, command = str(output / "base"), f"python atlas.py world --output {shlex.quote(str(output))} --seed {seed}"
    (building / "base" / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [dvpo, atlas]\n---\n# Base model of Atlas\n\n{parameters:,} "
        f"parameters, randomly initialised: it knows nothing yet. Its tokenizer was trained on the texts of Atlas. "
        f"sft.py starts here.\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})\n```\n\nMade by\n\n```\n{command}\n```\n",
        encoding="utf-8")
    for name in ("base", "data"):
        shutil.rmtree(output / name, ignore_errors=True)
        (building / name).rename(output / name)
    building.rmdir()
    print(f"wrote {output / 'data'} and {output / 'base'} ({parameters:,} parameters, seed {seed})")


# ---- 7. Summary: the closing table of `make demo` ----
def read_summary(run):
    """The numbers of a finished demo in one nested dict, which becomes runs/atlas/summary.json."""
    def last_line(name):
        return json.loads((run / name / "metrics.jsonl").read_text().splitlines()[-1])

    world = json.loads((run / "base" / "args.json").read_text())
    values = json.loads((run / "eval" / "values.json").read_text())
    policy = json.loads((run / "eval" / "policy.json").read_text())
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
    summary["seconds"] |= {stage: last_line(stage)["seconds"] for stage in ("sft", "gvm", "dvpo")}
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
            ("answer length, tokens", "response_length", "{:.1f}"), ("answers that end (EOS)", "eos_rate", "{:.1%}")]
    print(f"\nAtlas, seed {summary['seed']}, held-out questions{'SFT':>17}{'DVPO':>18}")
    for title, key, form in rows:
        cells = [form.format(x[key]) if form else "{:+.3f} to {:+.3f}".format(*x[key]) for x in (sft, dvpo)]
        print(f"{title:38}{cells[0]:>17}{cells[1]:>18}")
    low, high = dvpo["win_rate_interval"]
    print(f"{'win rate of DVPO over SFT':38}{'':17}{dvpo['win_rate_vs_sft']:>18.3f}   ({low:.3f} to {high:.3f})")
    print(f"GVM, held-out pair accuracy: mean value {accuracy['mean']:.3f}, last value {accuracy['last']:.3f}")
    print("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items()))
    answers = [json.loads(line) for line in (run / "eval" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    for kind in ("premise", "island", "capital"):
        prompt = next(answer["prompt"] for answer in answers if QUESTIONS[answer["prompt"]][0] == kind)
        print(f"\n  {prompt}")
        for name in ("sft", "dvpo"):
            said = next(answer for answer in answers if answer["prompt"] == prompt and answer["model"] == name)
            print(f"    {name:5}{said['score']:+.2f}  {said['response']}")
    print("\n" + "\n".join(str(path) for path in sorted((run / "figures").iterdir())) + f"\n{run / 'summary.json'}")


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
