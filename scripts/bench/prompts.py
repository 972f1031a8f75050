"""The benchmark's prompts: sixteen openings that a model goes on from, all cut to the same number of tokens."""

from __future__ import annotations

from typing import Any

# Too short for prefix reuse, so that a prompt that comes again is computed again.
PROMPT_TOKENS = 16
OPENINGS = (
    "The history of the railway begins long before the first steam engine was built, when miners in the hills pushed",
    "Once upon a time, in a small village beside a wide river, there lived an old fisherman who had never",
    "Photosynthesis is the process by which green plants, algae and some bacteria turn the light of the sun into",
    "The lighthouse keeper climbed the stairs every evening at dusk, carrying his lamp and the letters that nobody had",
    "In mathematics, a prime number is a natural number greater than one that is not a product of two smaller",
    "The city woke slowly that morning, and the baker on the corner had already sold half of his bread when",
    "Volcanoes form where the plates of the crust move apart or push against each other, and the molten rock below",
    "My grandmother kept a garden behind the house, and every spring she planted tomatoes, beans and a long row of",
    "The first computers filled whole rooms, and the people who worked with them wrote their programs on cards made of",
    "Whales are mammals that returned to the sea about fifty million years ago, and their closest relatives on land",
    "The expedition left the harbour in the middle of June with three ships, ninety men and enough food to last",
    "Bread is made from flour, water, salt and yeast, and the way in which these four things are mixed decides",
    "In the old days the harbour was full of sailing ships, and the sailors told stories about the islands they had",
    "When the war was over, the soldiers walked home through the mountains, and in every town they passed the people",
    "Glass is made by heating sand until it melts, and for thousands of years craftsmen have shaped it into vessels",
    "The library stood at the end of the street, a tall building of grey stone with narrow windows and a",
)


def cut_prompts(tokenizer: Any, tokens: int = PROMPT_TOKENS) -> list[str]:
    """All openings, cut to `tokens` tokens each. Raises ValueError if this tokenizer cannot cut one cleanly."""
    prompts = []
    for opening in OPENINGS:
        ids = tokenizer(opening)["input_ids"]
        prompt = tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        if len(tokenizer(prompt)["input_ids"]) != tokens:
            raise ValueError(f"the opening {opening[:20]!r} cannot be cut to {tokens} tokens with this tokenizer")
        prompts.append(prompt)
    return prompts
