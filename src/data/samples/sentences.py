"""The embedded sample of CoNLL-2003: sentences of a small grammar over lists of names, in the official layout, offline.

The same arguments give the same bytes. Some names are a person's, a place's or a club's by their sentence alone:
Washington spoke, flew to Washington, and lost to Washington.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from src.common.files import write_atomically


def _words(text: str) -> list[str]:
    return text.split()


AMBIGUOUS = _words(
    """
    Washington Jordan Paris Florence Lincoln Chelsea Milan Sydney Victoria Austin Georgia Houston Chester
    Lancaster Hamilton Wellington Columbia Charlotte Madison Preston Bolton Derby Santiago Lourdes Kent
    Orlando Adelaide Verona Siena Valencia Salvador Cordoba Leon Cali Montana Dakota Brooklyn London Boston
    Carlisle
    """
)
FIRST = _words(
    """
    Anna Peter Maria Ivan Fatima John Li Carlos Ingrid Omar Julia Thomas Aisha Pierre Olga Kenji Elena David
    Nadia Lars Chiara Miguel Sofia Hassan Emma Viktor Priya Jan Leila Marco Katrin Samuel Yuki Andrei Grace
    Pablo Helga Tariq Lucy Bruno Mei Stefan Amina Oscar Irina Hugo Rosa Nils Zainab Felix Clara Dmitri Eva
    Rashid Joan Mateo Greta Abdul Ines
    """
)
LAST = _words(
    """
    Smith Petrov Garcia Wolff Tanaka Okafor Rossi Dubois Larsen Novak Singh Khan Miller Ferrari Schmidt
    Kowalski Silva Andersson Haddad Moreau Becker Yamada Mensah Popescu Costa Jensen Ivanova Keller Nakamura
    Ortega Brown Lindqvist Mazur Rahman Fontaine Weber Santos Nielsen Horvat Ali Lopez Bauer Sato Adeyemi
    Bianchi Leroy Berg Svoboda Patel O'Neill Marchetti Vogel Takahashi Diallo Romero Hansen Kovac Farah Martin
    Esposito Girard Holm Dvorak McCarthy
    """
)
PLACES = _words(
    """
    Berlin France Tokyo Nigeria Rome Brazil Oslo Prague Delhi Pakistan Canada Vienna Poland Lisbon Sweden
    Beirut Lyon Hamburg Osaka Accra Bucharest Porto Denmark Moscow Zurich Kyoto Mexico Dublin Malmo Warsaw
    Dhaka Marseille Bonn Bahia Aarhus Zagreb Cairo Peru Munich Nagoya Lagos Turin Nice Bergen Brno Mumbai
    Belfast Naples Bremen Kobe Dakar
    """
)
LONG_PLACES = ("New York", "South Africa", "Sri Lanka", "Buenos Aires", "Hong Kong", "Costa Rica", "Saudi Arabia")
COMPANIES = _words(
    """
    Norvex Altimar Brightwell Quantor Helvion Pacifica Solaris Trident Meridian Oakfield Lumina Vertex
    Castellan Zephyr Orbis Kestrel Novara Pinnacle Granite Halcyon Aurelia Ironbridge Northgate Silverline
    Tessera Valmont Westbrook
    """
)
FORMS = ("Corp", "Inc", "Ltd", "Group", "Bank", "AG", "Industries", "Holdings", "Airlines", "Motors")
BODIES = (
    "United Nations", "European Commission", "World Bank", "Red Cross", "Labour Party", "Supreme Court", "NATO",
    "UNESCO", "OPEC", "Ministry of Finance", "University of Oslo", "Bank of Portugal", "Interpol", "FIFA",
)  # fmt: skip
CLUBS = ("United", "City", "Rovers", "Dynamo", "Athletic", "Wanderers", "Rangers")
MISC = _words(
    """
    German French Japanese Nigerian Italian Brazilian Norwegian Czech Indian Canadian Austrian Polish Swedish
    Lebanese Russian Swiss Mexican Irish Danish Egyptian Peruvian Spanish Turkish Dutch Greek Finnish
    """
)
EVENTS = ("World Cup", "Olympic Games", "Davis Cup", "Easter", "Ramadan", "Grand Prix", "Nobel Prize", "Tour de France")

TEMPLATES = (
    "{P} said on {D} that {O} would cut {N} jobs in {L} .",
    "{O} shares rose {N} percent in {L} trading on {D} .",
    "{P} , who lives in {L} , joined {O} in {Y} .",
    "{T} beat {T} {N} - {N} in {L} on {D} .",
    "{M} police arrested {N} people near {L} .",
    "The {M} government rejected a plan by {O} .",
    "{P} of {L} won the {E} ahead of {P} .",
    "{L} {Y}-08-{N}",
    "{P} told reporters that he had met {P} in {L} .",
    "Officials in {L} said the {M} minister would visit {L} on {D} .",
    "{O} named {P} as chairman .",
    "{T} signed {M} striker {P} from {T} for {N} million .",
    "{AP} spoke for {N} minutes and then left the {K} .",
    "The {J} flew to {AL} on {D} .",
    "{AP} scored twice as {T} lost to {AT} .",
    "{P} married {AP} in {AL} .",
    "A spokesman for {AF} said sales in {AL} had fallen .",
    "{AT} lost to {T} after {P} was sent off .",
    "It rained in {AL} , and {AP} stayed at home , her mother said .",
    "Prices fell by {N} percent in {Y} , a {J} said .",
    "The {K} was closed on {D} after {N} hours .",
    "The {J} did not say when the {K} would open again .",
    "{N} people were hurt near the {K} , a {J} said .",
    "\" We have to wait for the {J} , \" {P} said .",
    "{L} 's economy grew {N} percent in {Y} , according to {O} .",
    "The {E} opens in {L} in {Y} .",
)  # fmt: skip
# Slots: P person, L place, O organisation, T club, M nationality, E event; AP, AL, AT, AF an ambiguous name as a
# person, a place, a club, or with a company's form; D day, N number, Y year, J and K other words,
# which are no entities.
ENTITIES = {"P": "PER", "AP": "PER", "L": "LOC", "AL": "LOC", "M": "MISC", "E": "MISC"}  # all others are ORG
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
KNOWN = 0.7  # of each list of names, the share that training sentences are made of
VALUES: Mapping[str, Sequence[str]] = {
    "N": [str(number) for number in range(1, 60)],
    "Y": [str(year) for year in range(1980, 2030)],
    "D": DAYS,
    "J": _words(
        "doctor minister teacher farmer lawyer driver soldier judge priest coach nurse baker pilot mayor clerk"
    ),
    "K": _words("market school bridge harbour station court road factory museum hotel stadium airport church mine dam"),
}

Word = tuple[str, str]  # with its tag in IOB2


def draw(archive: Path, *, train: int = 1500, val: int = 300, test: int = 500, seed: int = 0) -> None:
    """Writes `train.txt`, `valid.txt`, `test.txt` and `unseen_test.txt` in the layout of `conll2003.zip`.

    The persons, places, nationalities and companies of `unseen_test.txt` are in none of the first three.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for number, (name, count) in enumerate(
            (("train", train), ("valid", val), ("test", test), ("unseen_test", test))
        ):
            grammar = Grammar(np.random.default_rng([seed, number]), is_new=name == "unseen_test")
            entry = zipfile.ZipInfo(f"{name}.txt", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, columns([grammar.sentence() for _ in range(count)]))
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(archive, buffer.getvalue())


def columns(sentences: Sequence[Sequence[Word]], per_document: int = 12) -> str:
    """Sentences in CoNLL's four columns, part of speech and chunk left out, with a document every few sentences."""
    lines: list[str] = []
    for number, sentence in enumerate(sentences):
        if number % per_document == 0:
            lines += ["-DOCSTART- -X- -X- O", ""]
        lines += [*(f"{word} -X- -X- {tag}" for word, tag in sentence), ""]
    return "\n".join(lines) + "\n"


class Grammar:
    """Draws sentences; `is_new`: with names that training sentences do not have."""

    def __init__(self, random: np.random.Generator, *, is_new: bool) -> None:
        self.random = random
        self.is_new = is_new

    def sentence(self) -> list[Word]:
        """A sentence's words, each with its tag; one in twelve is a headline in capitals."""
        words: list[Word] = []
        for part in self._one_of(TEMPLATES).split():
            slot = re.fullmatch(r"\{([A-Z]+)\}", part)
            if slot and slot[1] not in VALUES:
                entity_type = ENTITIES.get(slot[1], "ORG")
                name = self._name(slot[1]).split()
                words += [(word, f"{'I' if number else 'B'}-{entity_type}") for number, word in enumerate(name)]
            else:
                words.append((re.sub(r"\{(.)\}", lambda match: self._one_of(VALUES[match[1]]), part), "O"))
        return [(word.upper(), tag) for word, tag in words] if self.random.random() < 1 / 12 else words

    def _name(self, slot: str) -> str:
        """A name for a slot."""
        chance = self.random.random()
        if slot == "P":
            last = self._known(LAST if chance < 0.8 else AMBIGUOUS)
            return f"{self._known(FIRST)} {last}" if self.random.random() < 0.7 else last
        if slot == "L":
            return self._known(PLACES if chance < 0.7 else AMBIGUOUS if chance < 0.85 else LONG_PLACES)
        if slot == "O":
            return self._one_of(BODIES) if chance < 0.4 else f"{self._known(COMPANIES)} {self._one_of(FORMS)}"
        if slot == "T":
            name = self._known(PLACES if chance < 0.6 else AMBIGUOUS)
            return f"{name} {self._one_of(CLUBS)}" if self.random.random() < 0.4 else name
        if slot in "ME":
            return self._known(MISC) if slot == "M" else self._one_of(EVENTS)
        name = self._known(AMBIGUOUS)
        return f"{name} {self._one_of(FORMS)}" if slot == "AF" else name

    def _known(self, names: Sequence[str]) -> str:
        border = round(KNOWN * len(names))
        return self._one_of(names[border:] if self.is_new else names[:border])

    def _one_of(self, names: Sequence[str]) -> str:
        return names[int(self.random.integers(len(names)))]
