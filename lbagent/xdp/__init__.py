# SPDX-License-Identifier: Apache-2.0
"""The only room that imports bcc and touches BPF maps."""
