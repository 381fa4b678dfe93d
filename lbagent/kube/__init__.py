# SPDX-License-Identifier: Apache-2.0
"""The only room that imports kubernetes. Raw JSON in, model values out; status and Events written."""
