"""What a record of a prepared data set holds: image, label and name of a file.

A record is a serialized tf.train.Example, as TensorFlow Datasets and the task `convert` write them,
or an encoded image as it is. Neither needs TensorFlow.
"""

import functools
import re
from typing import Any, NamedTuple

# An image's first bytes. None of them begins like an Example, whose first byte is a line feed.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|P[2356]\s", re.DOTALL
)


class Fields(NamedTuple):
    """Names of the features of a record; `image` is None where the record itself is the image."""

    image: str | None
    label: str | None = None
    name: str | None = None


class Content(NamedTuple):
    """What was found in a record: label -1 and name None where there is none."""

    image: bytes
    label: int
    name: str | None


def content(record: bytes, fields: Fields) -> Content:
    """Take image, label and name out of a record.

    Raises:
        ValueError: it is no Example, or lacks one of the features.
    """
    if fields.image is None:
        return Content(record, -1, None)
    features = _features(record)
    image = _value(features, fields.image, "bytes_list")
    label = -1 if fields.label is None else int(_value(features, fields.label, "int64_list"))
    if fields.name is None:
        return Content(image, label, None)
    # Names of files are bytes that need not be text; a folder's names are decoded like this.
    name = _value(features, fields.name, "bytes_list").decode("utf-8", "surrogateescape")
    return Content(image, label, name)


def example(image: bytes, label: int | None, name: str) -> bytes:
    """Serialize a record of the features image, label (unless None) and file_name.

    The bytes are a function of the arguments.
    """
    message = _proto()[0]()
    features = message.features.feature
    features["image"].bytes_list.value.append(image)
    features["file_name"].bytes_list.value.append(name.encode("utf-8", "surrogateescape"))
    if label is not None:
        features["label"].int64_list.value.append(label)
    return message.SerializeToString(deterministic=True)


def guess_fields(record: bytes) -> Fields:
    """Find the image in a record of which nothing is known.

    It is the record, the feature "image", or the only one whose value begins like an image file.

    Raises:
        ValueError: there is no image, or a choice of several.
    """
    if is_image(record):
        return Fields(None)
    features = _features(record)
    images = [key for key in sorted(features) if is_image(*features[key].bytes_list.value[:1])]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        found = ", ".join(sorted(features)) or "none at all"
        what = f"several images ({', '.join(images)})" if images else "no encoded image"
        raise ValueError(
            f"{what} in a record; expected one, in a feature 'image'; its features: {found}"
        )
    return Fields(images[0])


def is_image(data: bytes = b"") -> bool:
    """Return whether bytes begin like an image file of a kind that can be decoded."""
    return _MAGIC.match(data) is not None


def _features(record: bytes) -> Any:
    example_class, error_class = _proto()
    try:
        features = example_class.FromString(record).features.feature
    except error_class:
        features = None
    if not features:
        raise ValueError(
            "expected an encoded image or a tf.train.Example; "
            f"got {len(record)} bytes that begin with {record[:16]!r}"
        )
    return features


def _value(features: Any, key: str, kind: str) -> Any:
    values = getattr(features[key], kind).value if key in features else ()
    if not values:
        what = {"bytes_list": "bytes", "int64_list": "an integer"}[kind]
        raise ValueError(f"no feature {key!r} with {what} (it has {', '.join(sorted(features))})")
    return values[0]


@functools.cache
def _proto() -> tuple[Any, type[Exception]]:
    """Return the class of tf.train.Example that comes with TFDS, and what it raises."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example, DecodeError
