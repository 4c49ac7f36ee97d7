"""What a record of a prepared data set holds: image, label and name of a file.

A record is a serialized tf.train.Example, as TensorFlow Datasets and the task `convert` write them,
or an encoded image as it is. Neither needs TensorFlow.
"""

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


def content(record: bytes, fields: Fields) -> tuple[bytes, int, str | None]:
    """Take image, label and name out of a record; the latter are -1 and None if it has none.

    Raises:
        ValueError: it is no Example, or lacks one of the features.
    """
    if fields.image is None:
        return record, -1, None
    features = _features(record)
    image = _value(features, fields.image, "bytes_list")
    label = -1 if fields.label is None else int(_value(features, fields.label, "int64_list"))
    if fields.name is None:
        return image, label, None
    # Names of files are bytes that need not be text; a folder's names are decoded like this.
    name = _value(features, fields.name, "bytes_list").decode("utf-8", "surrogateescape")
    return image, label, name


def example(image: bytes, label: int | None, name: str) -> bytes:
    """Serialize a record of the features image, label (unless None) and file_name.

    The bytes are a function of the arguments.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
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
    if _MAGIC.match(record):
        return Fields(None)
    features = _features(record)
    firsts = {key: features[key].bytes_list.value[:1] for key in sorted(features)}
    images = [key for key, first in firsts.items() if any(map(_MAGIC.match, first))]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        what = f"several images ({', '.join(images)})" if images else "no encoded image"
        raise ValueError(
            f"{what} in a record; expected one, in a feature 'image'; its features: "
            f"{', '.join(firsts)}"
        )
    return Fields(images[0])


def _features(record: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        if features := tf_example_pb2.Example.FromString(record).features.feature:
            return features
    except DecodeError:
        pass
    raise ValueError(
        "expected an encoded image or a tf.train.Example; "
        f"got {len(record)} bytes that begin with {record[:16]!r}"
    )


def _value(features: Any, key: str, kind: str) -> Any:
    values = getattr(features[key], kind).value if key in features else ()
    if not values:
        what = {"bytes_list": "bytes", "int64_list": "an integer"}[kind]
        raise ValueError(f"no feature {key!r} with {what} (it has {', '.join(sorted(features))})")
    return values[0]
