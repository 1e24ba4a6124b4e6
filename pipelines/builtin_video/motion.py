"""What the clips of the built-in video model's training show: things, motions, and the words for both.

A clip is (pixels, caption): "a panda moving left on a blue background", "a star growing". `studio.py` makes them.
"""

from dit_accel.pipelines.builtin.drawings import vocabulary as picture_vocabulary

# few of each: a small budget is better spent on doing them well
NOUNS = ("balloon", "car", "cat", "ghost", "heart", "panda", "rocket", "star")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}  # word -> (rows, columns)
MOTIONS = (*(f"moving {word}" for word in DIRECTIONS), "growing")
# those and what the text encoder knows of without a clip of it: room for more under the same vocabulary
WORDS = ("moving", "jumping", "spinning", "growing", "shrinking", "still", "left", "right", "up", "down", "above", "below", "of")

# shares of a clip's shorter side, from least to most
TRAVELLING = (0.46, 0.52)  # side of what travels: smaller than a picture's, so that its way fits into the frame
WAY = (0.38, 0.44)  # of the frame's height or width, that it goes
START = (0.36, 0.42)  # of its side at the end, that what grows begins with


def vocabulary() -> list[str]:
    """The image model's words, in their order, then the words for motion that it lacks."""
    words = picture_vocabulary()
    return words + [word for word in WORDS if word not in words]


def held_out(noun: str, motion: str) -> bool:
    """Whether the pair is kept from training, to test composition (about 1 in 12)."""
    return (sum(map(ord, noun)) * 7 + sum(map(ord, motion)) * 13) % 12 == 0
