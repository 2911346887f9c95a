"""Names of genes that a spreadsheet turned into dates, as SEPT2 into 2-Sep, and what they may have been.

Ziemann et al. 2016, "Gene name errors are widespread in the scientific literature". HGNC renamed these genes in 2020.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date, timedelta

# beginnings of months' names in English, German, Dutch, French, Spanish, Italian and Portuguese
_MONTHS = {
    "jan": 1, "ene": 1, "gen": 1, "feb": 2, "fév": 2, "fev": 2, "mar": 3, "mrz": 3, "mär": 3, "maa": 3, "mrt": 3,
    "apr": 4, "avr": 4, "abr": 4, "may": 5, "mai": 5, "mei": 5, "mag": 5, "jun": 6, "jui": 6, "giu": 6, "jul": 7,
    "lug": 7, "aug": 8, "aoû": 8, "ago": 8, "sep": 9, "set": 9, "oct": 10, "okt": 10, "ott": 10, "out": 10, "nov": 11,
    "dec": 12, "dez": 12, "déc": 12, "dic": 12,
}  # fmt: skip
_WORD = r"(?P<month>[A-Za-zäéû]{3,9})\.?"
_CLOCK = r"(?:[ T]0?0:00(?::00)?)?"
_NAMED = [
    re.compile(rf"(?P<day>\d{{1,2}})[-. /]{{1,2}}{_WORD}(?:[- /]\d{{2,4}})?{_CLOCK}"),  # 2-Sep, 02-Sep-24, 2. Sep
    re.compile(rf"{_WORD}[- /](?P<day>\d{{1,2}})(?:[-, /]{{1,2}}\d{{4}})?{_CLOCK}"),  # Sep-02, Sep 2, 2024
]
_ISO = re.compile(rf"(?:19|20)\d\d[-/.](?P<month>\d{{1,2}})[-/.](?P<day>\d{{1,2}}){_CLOCK}")  # 2024-09-02
_NUMBERS = re.compile(rf"(?P<one>\d{{1,2}})[/.-](?P<two>\d{{1,2}})[/.-](?:19|20)?\d\d{_CLOCK}")  # 02/09/2024, 9/2/24
_SERIAL = re.compile(r"[34]\d{4}(?:\.0)?")
_DAY_ZERO = date(1899, 12, 30)  # of spreadsheets
_GENES = {3: ("MARCHF", 11), 9: ("SEPTIN", 14), 12: ("DELEC", 1), 10: ("OCT", 11)}


def genes_of_date(name: str, serial: bool = False) -> tuple[str, ...] | None:
    """The genes whose name a spreadsheet may have turned into this date; None if `name` is no date.

    serial: a number of five digits may be a date too, in days: only where other names are no numbers.

    >>> genes_of_date("1-Mar"), genes_of_date("2024-09-02"), genes_of_date("Dez 01"), genes_of_date("TP53")
    (('MARCHF1', 'MTARC1'), ('SEPTIN2',), ('DELEC1',), None)
    >>> genes_of_date("03/09/2024"), genes_of_date("44256", serial=True)
    (('SEPTIN3', 'MARCHF9'), ('MARCHF1', 'MTARC1'))
    """
    found = list(_dates(name.strip(), serial))
    return None if not found else tuple(dict.fromkeys(gene for month, day in found for gene in _named(month, day)))


def _dates(name: str, serial: bool) -> Iterator[tuple[int, int]]:
    """(month, day) that a name may mean."""
    for pattern in _NAMED:
        if (found := pattern.fullmatch(name)) and (month := _MONTHS.get(found["month"][:3].lower())):
            yield month, int(found["day"])
            return
    if found := _ISO.fullmatch(name):
        yield int(found["month"]), int(found["day"])
    elif found := _NUMBERS.fullmatch(name):
        day, month = int(found["one"]), int(found["two"])
        yield from ((m, d) for m, d in ((month, day), (day, month)) if m <= 12 and d <= 31)
    elif serial and _SERIAL.fullmatch(name):
        when = _DAY_ZERO + timedelta(int(float(name)))
        if _named(when.month, when.day):
            yield when.month, when.day


def _named(month: int, day: int) -> list[str]:
    stem, most = _GENES.get(month, ("", 0))
    if not 1 <= day <= most:
        return ["SELENOF"] if (month, day) == (9, 15) else []
    if stem == "OCT":
        return ["POU5F1"] if day in (3, 4) else []
    return [f"{stem}{day}"] + ([f"MTARC{day}"] if month == 3 and day <= 2 else [])


def dates_among(genes: Sequence[str]) -> dict[str, str]:
    """Names that a spreadsheet has turned into dates -> the same with the names they may have had, in words.

    >>> dates_among(["TP53", "KRAS", "EGFR", "2-Sep", "44256", "5-Jun"])
    {'2-Sep': '2-Sep (SEPTIN2?)', '44256': '44256 (MARCHF1 or MTARC1?)', '5-Jun': '5-Jun'}
    >>> dates_among(["7157", "3845", "44256"])
    {}
    """
    serial = sum(gene.isdigit() for gene in genes) < len(genes) / 2
    found = {gene: genes_of_date(gene, serial) for gene in genes}
    return {
        gene: f"{gene} ({' or '.join(likely)}?)" if likely else gene
        for gene, likely in found.items()
        if likely is not None
    }
