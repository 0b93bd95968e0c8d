"""What users write: parameters of StorageClasses and VolumeAttributesClasses, mount options, volume contexts.

Pure: controller and node call the same functions, so that a mistake is refused before a volume exists.
"""
