"""The way of an image from its source to the device."""
