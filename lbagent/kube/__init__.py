"""The only room that imports kubernetes. Raw JSON in, model values out; status and Events written."""
