"""What users write: parameters of classes and mount options. Pure: controller and node call the same functions."""
