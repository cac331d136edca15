"""Names and descriptions of the synthetic world's titles: sentences that carry genre, theme, tone and country.

A *theme* is a kind of story within a genre, always of one category (series, movie or live); the world's viewers like
themes. Each theme has its own leads, plots and nouns, so that a sentence encoder can tell themes apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Theme(NamedTuple):
    """One kind of story; `leads`, `plots` and `nouns` are its vocabulary."""

    genre: str
    kind: str
    name: str
    leads: tuple[str, ...]
    plots: tuple[str, ...]
    nouns: tuple[str, ...]


# genre -> four themes of four lines: kind | name, leads, plots, nouns; alternatives are separated by semicolons
_VOCABULARY = {
    "crime": """
series | police procedural
    a homicide detective; two patrol partners; a forensic examiner
    investigate murders across the precinct; follow fingerprints to a killer; reopen a cold case
    Precinct; Evidence; Suspect; Badge
series | courtroom drama
    a defence lawyer; a young prosecutor; a weary judge
    argue an impossible trial; cross-examine a lying witness; fight a wrongful conviction
    Verdict; Jury; Objection; Appeal
movie | bank heist
    a retired safecracker; a crew of thieves; a getaway driver
    plan one last robbery; break into a casino vault; steal diamonds under the guards' eyes
    Vault; Heist; Getaway; Diamonds
movie | mafia saga
    a mob boss; an heir of the family; an undercover informant
    fight for control of the rackets; betray the godfather; launder money for the syndicate
    Godson; Syndicate; Omerta; Racket""",
    "science fiction": """
series | space opera
    a starship captain; a rebel pilot; an alien ambassador
    cross the galaxy between warring empires; defend a colony on a distant moon; discover an abandoned orbital fleet
    Nebula; Starfall; Orbit; Armada
series | time travel
    a physicist; a stranded time agent; a watchmaker's daughter
    wake in the wrong century; repair a broken timeline; meet her own future self in a loop
    Paradox; Chronicle; Yesterday; Loop
movie | robots and minds
    an android; a programmer; an artificial intelligence
    become conscious in the laboratory; ask what makes a machine human; lead an uprising of robots
    Circuit; Automaton; Signal; Machine
movie | after the collapse
    the last survivors; a scavenger; a mother in the wasteland
    search for water in a ruined city; escape raiders after the nuclear war; carry the vaccine through the dead zones
    Ashes; Wasteland; Fallout; Remnant""",
    "romance": """
series | office love
    an intern; a shy architect; two rival editors
    fall in love with a colleague; hide a relationship from the whole office; write anonymous love letters at work
    Desk; Valentine; Coffee; Promotion
series | second chances
    a divorced florist; a widower; high-school sweethearts
    find love again after forty; return to the first love; learn to date with grown children
    Bouquet; Again; Reunion; Letters
movie | wedding comedy
    a wedding planner; a runaway bride; the best man
    chase the wrong groom to the altar; save a disastrous ceremony; fall for the bridesmaid
    Bride; Altar; Bouquet Toss; Vows
movie | summer abroad
    a backpacking student; a lonely chef; a travel writer
    spend a summer romance by the sea; kiss a stranger on an island; miss the last ferry home together
    Summer; Island; Ferry; Sunset""",
    "comedy": """
series | flatmates
    three flatmates; a hopeless landlord; unemployed friends
    share a tiny apartment and its rent; argue about the dishes; hide a dog from the landlord
    Sofa; Flat; Roommates; Rent
series | workplace satire
    a clueless manager; bored employees; the human resources team
    survive pointless meetings; compete for the parking space; launch an absurd product
    Meeting; Cubicle; Memo; Boss
movie | road trip farce
    two idiots; a bickering family; a bachelor party
    drive across the country in a stolen van; lose the luggage and the groom; miss every motorway exit
    Highway; Detour; Van; Luggage
movie | parody
    a bumbling secret agent; the worst knight; a fake superhero
    spoof spy films with slapstick; ruin every mission by accident; mock the clichés of blockbusters
    Spoof; Blunder; Agent Zero; Disguise""",
    "horror": """
series | haunted house
    a family; a paranormal investigator; a night nurse
    move into a house full of ghosts; hear whispers in the cellar; uncover a seance gone wrong
    Haunting; Cellar; Whisper; Manor
series | vampires
    an ancient vampire; a village priest; a sleepless student
    feed on blood by moonlight; hunt the undead in a crypt; resist an immortal lover
    Crypt; Fang; Bloodline; Dusk
movie | slasher
    a masked killer; camp counsellors; the last girl
    stalk teenagers with a knife; survive the night of the massacre; run through the woods from an axe
    Massacre; Mask; Blade; Scream
movie | creatures
    a giant spider swarm; a diver; scientists at the pole
    awaken a monster from the deep; fight parasites in an arctic station; flee a beast in the tunnels
    Beast; Swarm; Abyss; Parasite""",
    "documentary": """
series | wildlife
    a film crew; a pride of lions; migrating whales
    follow animals through the savannah; record rare birds in the rainforest; observe predators and their young
    Savannah; Wild; Migration; Reef
series | true science
    astronomers; a brain surgeon; volcanologists
    explain black holes and telescopes; look inside the living brain; measure an erupting volcano
    Cosmos; Neuron; Crater; Element
movie | food and travel
    a street cook; a baker; a wine grower
    taste the kitchens of the world; bake bread by the old recipes; harvest grapes in the valley
    Kitchen; Harvest; Spice; Bread
movie | business and power
    a whistleblower; bankers; a start-up founder
    expose corporate fraud; explain the financial crash; follow the money behind the election
    Fraud; Market; Ledger; Empire""",
    "fantasy": """
series | dragons and thrones
    an exiled queen; a dragon rider; rival houses
    fight for the throne with swords; hatch the last dragon; march an army to the wall
    Throne; Dragon; Crown; Sword
series | school of magic
    an apprentice wizard; a young witch; a forgetful sorcerer
    learn spells at the academy; brew a forbidden potion; open the book of enchantments
    Spell; Wand; Academy; Potion
movie | fairy tale
    a princess; a woodcutter's son; a talking fox
    break an old curse in the forest; bargain with the fairies; search for the glass castle
    Curse; Fairy; Castle; Thorn
movie | mythic heroes
    a demigod; a shieldmaiden; the thief of Olympus
    challenge the gods and the minotaur; sail to the underworld; steal fire from the titans
    Olympus; Titan; Odyssey; Oracle Stone""",
    "drama": """
series | hospital
    a surgeon; emergency nurses; a young resident
    save patients in the emergency room; operate through the night; face an epidemic on the ward
    Ward; Pulse; Surgery; Shift
series | family dynasty
    a publishing dynasty; three sisters; the black sheep
    fight over the inheritance; hide a family secret for decades; sell the estate behind the father's back
    Inheritance; Estate; Sisters; Heir
movie | immigrant lives
    a seamstress; a refugee boy; a taxi driver
    cross the border for a new life; learn the language of a foreign city; send money to the village
    Border; Harbour; Passport; Crossing
movie | illness and grief
    a cellist; a dying father; a hospice volunteer
    say goodbye to a loved one; learn to live with loss; write a last diary
    Farewell; Diary; Silence; Winter""",
    "history": """
series | royal court
    a young empress; a court poet; the king's mistress
    survive intrigues at the palace; arrange royal marriages; plot against the regent in corsets and candlelight
    Palace; Empress; Regent; Court
series | ancient rome
    a gladiator; a senator; a slave girl
    fight in the arena; conspire against the emperor; march with the legions
    Legion; Arena; Caesar; Senate
movie | world war
    a tank crew; resistance fighters; a field medic
    storm the beach under fire; hide from soldiers in the occupied town; hold the trench till dawn
    Trench; Battalion; Front; Armistice
movie | explorers at sea
    a ship's captain; a cartographer; a mutinous crew
    sail around the cape for spices; map an unknown coast; survive a shipwreck in the ice
    Voyage; Compass; Mutiny; Horizon""",
    "children": """
series | talking animals
    a brave hedgehog; puppies; a clumsy bear cub
    rescue animals on the farm; solve small problems with friends; learn to share honey
    Puppy; Meadow; Paws; Barnyard
series | toy adventures
    toy trains; building bricks; a paper astronaut
    race around the playroom; build a bridge of bricks; learn to count and sing
    Playroom; Bricks; Choo; Toybox
movie | animated quest
    a little penguin; a girl and her kite; a cartoon robot
    set out on a colourful animated journey; find the way home over the mountains; befriend a lonely whale
    Kite; Penguin; Rainbow; Balloon
movie | young inventors
    twin inventors; a school science club; a curious girl
    build a rocket in the garage; outsmart grown-ups with gadgets; win the science fair
    Gadget; Rocket Club; Inventors; Treehouse""",
    "sport": """
live | football night
    the champions; the league leaders; two old rivals
    play the football derby; defend the title with late goals; meet in the cup final on grass
    Derby; Kick-off; Cup; Goal
live | motor racing
    drivers; the pole sitter; the pit crews
    race the grand prix lap by lap; change tyres in the rain; overtake in the last corner
    Grand Prix; Lap; Pit Lane; Chicane
live | tennis and golf
    the top seed; a qualifier; golfers
    serve for the match at the tournament; play five sets on clay; putt on the eighteenth hole
    Match Point; Open; Rally; Fairway
live | combat sports
    the heavyweight champion; a boxer; two grapplers
    fight twelve rounds for the belt; win by knockout in the ring; weigh in for the bout
    Knockout; Bout; Ringside; Title Fight""",
    "music": """
live | rock concert
    a rock band; guitarists; a punk trio
    play a stadium with loud guitars; return for a reunion tour; smash the drums at the encore
    Encore; Amplifier; Stadium; Feedback
live | classical evening
    a symphony orchestra; a pianist; a string quartet
    perform a symphony at the philharmonic; play sonatas by candlelight; conduct an opera gala
    Sonata; Symphony; Overture; Opera
live | dance and club
    a DJ; an electronic duo; dancers
    mix techno until morning; spin house music on the beach; play synthesizers under lasers
    Bassline; Rave; Mix; Afterhours
live | award show
    pop stars; the host; nominees
    hand out awards on the red carpet; perform hits at the gala; thank the fans in tears
    Red Carpet; Gala; Trophy; Spotlight""",
}


def _parse(vocabulary: dict[str, str]) -> tuple[Theme, ...]:
    themes = []
    for genre, block in vocabulary.items():
        lines = block.strip().splitlines()
        for first in range(0, len(lines), 4):
            kind, name = lines[first].split(" | ")
            words = (tuple(word.strip() for word in line.split(";")) for line in lines[first + 1 : first + 4])
            themes.append(Theme(genre, kind, name, *words))
    return tuple(themes)


THEMES = _parse(_VOCABULARY)
GENRES = tuple(_VOCABULARY)
KINDS = ("series", "movie", "live")
# tone 0, 1, 2: the worse to the better received; part of a title's quality, so that content predicts it
TONES = (
    (
        "A slow and uneven production that critics ignored.",
        "Low budget, thin writing and little to remember.",
    ),
    (
        "Solid entertainment for a quiet evening.",
        "A familiar formula, competently made.",
    ),
    (
        "An acclaimed, award-winning sensation.",
        "Praised by critics as brilliant and unforgettable.",
    ),
)
_ADJECTIVES = (
    "Silent Golden Broken Hidden Endless Crimson Lonely Electric Frozen Burning Secret Distant Hollow Velvet Wild "
    "Final Second Midnight Paper Iron Glass Lucky Bitter Gentle Restless Forgotten Northern Southern Little Great"
)
_PLACES = (
    "Avalon Bergen Cairo Dakar Eden Florence Galway Havana Istanbul Jaipur Kyoto Lisbon Malta Naples Oslo Porto Quito "
    "Riga Seville Tunis Utrecht Verona Windsor York Zanzibar"
)
_FIRST_NAMES = (
    "Ada Bruno Carla Dmitri Elena Farid Greta Hugo Ines Jonas Kira Liam Mina Noel Olga Pablo Rosa Sven Tara Yuri"
)
_LAST_NAMES = (
    "Almeida Brandt Castillo Dumont Eriksen Fontana Grigorev Hayashi Ivanova Jansen Kowalski Laurent Moreau Nakamura "
    "Okafor Petrov Quintana Rossi Silva Tanaka Ueda Vargas Weber Yilmaz Zhang"
)


def people_names(count: int) -> list[str]:
    """`count` distinct names of actors or studios' founders."""
    pairs = [f"{first} {last}" for last in _LAST_NAMES.split() for first in _FIRST_NAMES.split()]
    return [pairs[i % len(pairs)] + ("" if i < len(pairs) else f" {i // len(pairs) + 1}") for i in range(count)]


def title_names(theme_of_title: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Distinct display names; int [N] themes -> N strings. A repeated name gets a place, then a number."""
    taken: set[str] = set()
    all_adjectives, all_places = _ADJECTIVES.split(), _PLACES.split()
    adjectives = rng.integers(len(all_adjectives), size=len(theme_of_title))
    places = rng.integers(len(all_places), size=len(theme_of_title))
    nouns = rng.integers(4, size=len(theme_of_title))
    names = []
    for theme, adjective, place, noun in zip(theme_of_title, adjectives, places, nouns, strict=True):
        short = f"The {all_adjectives[adjective]} {THEMES[theme].nouns[noun]}"
        long = f"{short} of {all_places[place]}"
        name, part = (short if short not in taken else long), 2
        while name in taken:
            name, part = f"{long} {part}", part + 1
        taken.add(name)
        names.append(name)
    return names


def descriptions(
    theme_of_title: np.ndarray,
    tone_of_title: np.ndarray,
    countries: list[str],
    rng: np.random.Generator,
) -> list[str]:
    """Three sentences a title: who does what (theme), what kind of title from where, and how it was received (tone).

    Args:
        theme_of_title: int [N], index into THEMES.
        tone_of_title: int [N], index into TONES.
        countries: N country names.
        rng: draws the wording.
    """
    words = rng.integers(1 << 30, size=(len(theme_of_title), 4))
    texts = []
    for theme_index, tone, country, draw in zip(theme_of_title, tone_of_title, countries, words, strict=True):
        theme = THEMES[theme_index]
        lead = theme.leads[draw[0] % len(theme.leads)]
        first, second = (
            theme.plots[draw[1] % len(theme.plots)],
            theme.plots[draw[2] % len(theme.plots)],
        )
        story = first if first == second else f"{first} and {second}"
        received = TONES[tone][draw[3] % len(TONES[tone])]
        form = {"series": "series", "movie": "film", "live": "live broadcast"}[theme.kind]
        told = f"{lead[0].upper()}{lead[1:]} must {story}."
        texts.append(f"{told} A {theme.genre} {form} from {country} about {theme.name}. {received}")
    return texts
