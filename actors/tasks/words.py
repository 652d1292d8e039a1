"""Words that tasks make keys, values and lists of. No word is part of another one, nor of a task's own sentences.

Samples are drawn by place in these tables: whatever is added, removed or moved changes the samples of every seed.
"""

from __future__ import annotations

from actors.tasks.sample import Draws


def _table(words: str) -> tuple[str, ...]:
    return tuple(words.split())


ADJECTIVES = _table(
    """amber ancient bashful bitter blunt bold brisk brittle calm careful cheerful clever clumsy cosmic crimson crooked
    daring dusty eager elegant faithful fearless fierce fluffy foggy frozen gentle giddy gloomy golden graceful greedy
    hasty hollow honest humble icy jolly keen lively lonely loyal lucky mellow mighty misty modest mossy muddy nervous
    noble patient playful polite proud quiet rapid rustic salty scarlet sleepy slender solemn stubborn sturdy tidy timid
    tranquil vivid wandering wicked wistful witty zealous"""
)

NOUNS = _table(
    """acorn anchor badger banjo basket beacon beetle bramble bucket cactus camel candle canyon carpet cavern cello
    cherry cobbler comet compass copper coral cradle crystal dagger daisy dolphin donkey drummer eagle ember falcon
    feather fiddle fountain galley garlic geyser giraffe glacier goblet hammer harbor hazel hedgehog helmet heron
    hornet island jacket jaguar jasmine kettle ladder lagoon lantern lemon lobster locust magnet mango maple marble
    meadow mirror mitten monsoon moose mushroom needle nettle nutmeg octopus olive orchard otter oyster panther parrot
    pebble pelican pepper pigeon pillow plank pocket pumpkin quarry rabbit raven ribbon rocket saddle salmon sandal
    scarf shovel sparrow spider squirrel tailor temple thimble timber trumpet tulip turtle tunnel valley velvet violet
    walnut walrus whistle willow window yogurt zebra"""
)

VALUES = _table(
    """abacus almond apricot anvil asphalt bamboo barrel biscuit blanket bonfire bottle bridge bronze buffalo butter
    cabbage cannon canvas caramel castle cedar chimney cinnamon circus clarinet coconut cotton cricket cushion desert
    diamond dragon emerald engine fabric ferry flamingo forest fossil furnace galaxy ginger granite guitar hammock
    harvest honey hurricane iceberg igloo indigo ivory jungle kangaroo kiosk lavender leather lizard locket mammoth
    mattress melon meteor molasses mosaic mustard nectar noodle oatmeal opera orchid paddle pancake papaya parsley
    pendulum penguin piano pirate planet popcorn prism puzzle pyramid radish raisin reindeer rhubarb rooster saffron
    sapphire satchel sausage scooter shampoo spinach sponge stadium sunflower tadpole teapot thunder toffee tornado
    tortoise tractor trolley tuxedo umbrella vanilla vinegar volcano waffle wizard zeppelin"""
)

_ONSETS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def made_up_words(draws: Draws, count: int, num_syllables: int = 3) -> list[str]:
    """Different words of consonants and vowels that mean nothing, all of one length."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draws.pick(_ONSETS) + draws.pick(_VOWELS) for _ in range(num_syllables))] = None
    return list(words)
