"""The cleaning of captions that LlamaGen was trained under: DeepFloyd's rules, as in language/t5.py.

Made for captions from the web, it also eats what a prompt may mean: quotes, digits in names, hyphens, "shipping".
Off for new runs; on where published images are to be reproduced.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

from ...extras import require

SITE = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58"
    r"\uFE63\uFF0D]+"
)
FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# In order; each is (pattern, replacement).
LINKS = (
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{SITE}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{SITE}))", ""),
)
MARKS = (
    (r"@[\w\d]+\b", ""),  # user names
    (r"[\u31c0-\u31ef]+", ""),  # Chinese, Japanese and Korean blocks
    (r"[\u31f0-\u31ff]+", ""),
    (r"[\u3200-\u32ff]+", ""),
    (r"[\u3300-\u33ff]+", ""),
    (r"[\u3400-\u4dbf]+", ""),
    (r"[\u4dc0-\u4dff]+", ""),
    (r"[\u4e00-\u9fff]+", ""),
    (DASHES, "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{FILE_TYPES})", ""),  # names of files
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\\/\*]{1,}", " "),
    (r"\s+\.\s+", " "),
)
WORDS = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article codes: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second letter is Cyrillic
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """One pass of the published cleaning; it is applied twice."""
    require("ftfy", "captions")
    require("bs4", "captions")
    from bs4 import BeautifulSoup
    from ftfy import fix_text

    caption = _replace(unquote_plus(caption).strip().lower(), LINKS)
    caption = _replace(BeautifulSoup(caption, features="html.parser").text, MARKS)
    if len(re.findall(r"[-_]", caption)) > 3:  # this-is-how-files-are-named
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(fix_text(caption))).strip()
    return _replace(caption, WORDS).strip()


def _replace(caption: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        caption = re.sub(pattern, replacement, caption)
    return caption
