"""Tables as notebooks show them: captions, boxes, and strangers' text as it is."""

from html.parser import HTMLParser

import pandas as pd

from nt_utils.study.display import LONG, styled

HOSTILE = '<img src=x onerror="alert(1)"> <REDACTED WEBSITE> & $x_1$'


class Text(HTMLParser):
    """The tags and the words of a page, as a browser reads them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words += data


def test_a_table_has_a_caption_no_index_and_a_box_when_it_is_long():
    frame = pd.DataFrame({"arm": ["a", "b"], "value": [1 / 3, None], "n": [1, 2]}, index=[5, 5])
    page = styled(frame, "What it is.", {"value": "{:.1f}"}).to_html()
    assert "<caption>What it is.</caption>" in page
    assert ">0.3<" in page
    assert ">nan<" not in page
    assert ">5<" not in page
    assert "max-height" not in page
    assert page == styled(frame, "What it is.", {"value": "{:.1f}"}).to_html(), "no random names"
    assert "max-height" in styled(pd.concat([frame] * LONG), "").to_html()


def test_text_in_cells_names_and_captions_is_shown_and_never_read_as_html():
    frame = pd.DataFrame({HOSTILE: [HOSTILE, 0.5]})
    read = Text(styled(frame, HOSTILE, {HOSTILE: str}).to_html())
    assert not {"img", "redacted"} & set(read.tags)
    assert read.words.count(HOSTILE) == 3
    assert "mathjax_ignore" in styled(frame, "").to_html()
