"""What is known beforehand about public data sets, to tell a right copy from a wrong one (chapter 14)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A set's parts by split, each part's digest, and for images the training split's channel means and deviations."""

    parts: Mapping[str, tuple[str, ...]]
    digests: Mapping[str, str]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tolerance: float = 6e-6
    """How far a mean may be off: half a unit of the last digit, more where decoders differ."""
    classes_digest: str | None = None
    """Where given, the facts hold only for the set with this list of classes (there are several of that name)."""


# The CIFAR-100 classes are numbered in alphabetical order.
CIFAR100_SUPERCLASSES: Mapping[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple", "oak", "palm", "pine", "willow"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}

KNOWN: Mapping[str, Known] = {
    "cifar100": Known(
        parts={"train": ("train-0", "train-1"), "test": ("test",)},
        digests={
            "train-0": "276a4cd8331eadf663ca1ccc0797f7922c8971656c8f420371e25a89383d4bca",
            "train-1": "e9de84ebf8f368cabcfc162d1a540de6af2793aea0e7329a0479d0ba8f4145bb",
            "test": "9b80fbbef08a00213617d1faddcdf5bb78db55ca2b7afd62fc607138eb38389d",
        },
        mean=(0.50708, 0.48655, 0.44092),
        std=(0.26733, 0.25644, 0.27615),
    ),
    "imagenet64": Known(
        parts={"train": ("train-0", "train-1"), "test": ("val",)},
        digests={
            "train-0": "c0bbf6954d45c1169cd969ab5a38994e6e12384ffac58fc1ed3efc5d007460b8",
            "train-1": "104d9cfcd730703f27c48eb3659d3c084430998d4834eba0405ee6694140b3f8",
            "val": "96b2bfad74c90c29258fd7e5b3e491c51a0d3c16e27b4a2c2fe2550958fa373d",
        },
        mean=(0.47966, 0.4478, 0.39727),
        std=(0.27652, 0.26903, 0.28167),
        tolerance=5e-4,
        classes_digest="fef8863d4f46dcf56afa76caebeb72f67e7f6b10681fffca34abcd0a54eb7bc6",
    ),
}
