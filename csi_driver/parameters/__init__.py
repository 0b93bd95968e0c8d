# SPDX-License-Identifier: Apache-2.0
"""What users write: parameters of classes and mount options. Pure: controller and node call the same functions."""
