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
        digests={},
        mean=(0.50708, 0.48655, 0.44092),
        std=(0.26733, 0.25644, 0.27615),
    ),
    "imagenet64": Known(
        parts={"train": ("train-0", "train-1"), "test": ("val",)},
        digests={},
        classes_digest="",
    ),
}
