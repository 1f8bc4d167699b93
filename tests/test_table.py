from flexmagic.client.table import Table, size_text


def test_text_is_aligned_and_html_is_escaped_with_its_indents():
    table = Table(("a", "bb"), (("1", "<script>"), ("  deep", "")), "Title & more")
    assert str(table).splitlines() == [
        "Title & more",
        "a       bb",
        "──────  ────────",
        "1       <script>",
        "  deep",
    ]
    page = table._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Title &amp; more" in page
    assert "white-space:pre-wrap" in page
    assert str(Table(("ab",), ())) == "ab\n──"


def test_sizes_are_read_at_a_glance():
    assert [size_text(n) for n in (0, 999, 1000, 8_100_000, 3 * 10**12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "8.1 MB",
        "3.0 TB",
    ]
