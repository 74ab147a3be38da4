"""The disks inside images: which bytes of the file a byte of the disk comes from. Rule: pure; who asks
fetches.
"""
