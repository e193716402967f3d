"""Where nodes begin: from the text of the kernel."""

from __future__ import annotations

from balloon_agent.linux.zones import node_starts

# Two nodes: the first in three zones, with the hole below 4 GiB; the second has 4 GiB. As the kernel writes it, but shorter.
TWO_NODES = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 643
  pages free     3840
        min      22
        spanned  4095
        present  3998
        managed  3840
        protection: (0, 3019, 11339, 11339, 11339)
  pagesets
    cpu: 0
              count:    0
  node_unreclaimable:  0
  start_pfn:           1
Node 0, zone    DMA32
  pages free     772915
        spanned  1044480
        present  782336
        managed  772915
  node_unreclaimable:  0
  start_pfn:           4096
Node 0, zone   Normal
  pages free     2037
        spanned  262144
        present  262144
        managed  262144
  node_unreclaimable:  0
  start_pfn:           1048576
Node 0, zone  Movable
  pages free     0
        spanned  0
        present  0
        managed  0
        protection: (0, 0, 0, 0, 0)
Node 1, zone   Normal
  per-node stats
      nr_inactive_anon 3
  pages free     1037
        spanned  1048576
        present  1048576
        managed  1032192
  node_unreclaimable:  0
  start_pfn:           1310720
Node 1, zone  Movable
  pages free     0
        spanned  0
        present  0
        managed  0
        protection: (0, 0, 0, 0, 0)
"""


def test_every_zone_with_pages_begins_and_ends_somewhere() -> None:
    assert node_starts(TWO_NODES, 4096) == [1, 4096, 1048576, 1310720, 1310720 + 1048576]


def test_frames_are_of_4_kib_whatever_the_pages_are() -> None:
    assert node_starts(TWO_NODES, 65536) == [16 * page for page in node_starts(TWO_NODES, 4096)]


def test_nothing_is_known_from_nothing() -> None:
    assert node_starts("", 4096) == []
