"""The sources that guest memory is taken from: memory blocks, hugetlbfs, transparent huge pages, single pages."""
