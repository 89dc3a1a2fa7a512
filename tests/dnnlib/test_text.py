import pytest

from dnnlib import text as formats


@pytest.mark.parametrize(
    ("text", "value"),
    [("200", 200), (7, 7), ("64Mi", 64 * 2**20), ("16ki", 16384), ("1Gi", 2**30), ("2k", 2000), ("1.5M", 1_500_000),
     ("0.5Ki", 512), ("0", 0), (" 3 ", 3)],
)  # fmt: skip
def test_parse_si(text, value):
    assert formats.parse_si(text) == value


@pytest.mark.parametrize("text", ["", "Ki", "-1", "1.5", "1e3", "0.3Ki", "5T", "1 Ki", "1.", "²", "9" * 40, "nan"])
def test_parse_si_refuses(text):
    with pytest.raises(ValueError, match="whole number"):
        formats.parse_si(text)


def test_formats():
    times = [0.4, 42, 187, 18120, 86400 * 2 + 4 * 3600]
    assert [formats.format_time(t) for t in times] == ["0s", "42s", "3m 07s", "5h 02m", "2d 04h"]
    sizes = [0, 512, 1536, 2.3 * 2**30, 5 * 2**40]
    assert [formats.format_bytes(n) for n in sizes] == ["0 B", "512 B", "1.5 KiB", "2.3 GiB", "5.0 TiB"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("11h30m", 41400),
        ("90m", 5400),
        ("2d", 172800),
        ("1h 5m 30s", 3930),
        ("45", 45),
        ("0.5h", 1800),
        ("1D2H", 93600),
    ],
)
def test_lengths_of_time(text, seconds):
    assert formats.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "11:30", "30m11h", "1h1h", "-5m", "5x", "1e3"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(ValueError, match="as in 11h30m"):
        formats.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host:80/a/b.pkl?token=secret#secret", "https://host:80/a/b.pkl"),
        ("https://me:secret@host", "https://host"),
        ("https://secret@host/?secret", "https://host/"),
        ("http://me:se/cr?et#@host/x", "http://host/x"),
        ("http://me:p@secret@host/x", "http://host/x"),
        ("https://host/x.pkl?token=secret#sha256=00ff", "https://host/x.pkl#sha256=00ff"),
        ("https://host/x.pkl?sha256=secret", "https://host/x.pkl"),
        ("https://host:8080/@me/net@1.pkl", "https://host:8080/@me/net@1.pkl"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("hf://owner/repo/file@rev", "hf://owner/repo/file@rev"),
        (
            "run '--net=http://h/x?secret' --ref HTTP://a:secret@h/y?secret, ok?",
            "run '--net=http://h/x' --ref HTTP://h/y, ok?",
        ),
        ("http://h/x?secret: no such file", "http://h/x: no such file"),
        ("what? a#b user@host", "what? a#b user@host"),
    ],
)
def test_secrets_of_urls_are_left_out(text, shown):
    assert formats.redact(text) == shown
