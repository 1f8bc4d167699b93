"""The word lists from which every training sentence is made.

The names come in two parts.  ``TRAIN_*`` names appear everywhere; ``HELD_OUT_*``
names appear in stories but never in an indirect-object sentence, so that accuracy
on them shows that the model copies a name instead of recalling a sentence.
"""

from __future__ import annotations

TRAIN_GIRLS: tuple[str, ...] = tuple(
    "Mary Anna Lucy Emma Sarah Alice Laura Kate Jane Susan Linda Helen Emily Grace Rose Julia "
    "Clara Nancy Betty Carol Diana Ellen Fiona Hannah Irene Karen Lily Maria Nina Olivia Paula "
    "Rachel Sophie Tina Vera Wendy Zoe Amy Molly Ruth "
    "Abigail Ada Agnes Alina Amanda Amelia Angela Anita Annie Audrey Barbara Bella Bianca Brenda "
    "Bridget Camilla Carla Caroline Catherine Cecilia Celia Chloe Christine Cindy Cora Daphne Deborah "
    "Denise Donna Dora Doris Edith Eleanor Elizabeth Ella Elsa Erica Esther Eve Flora Frances Frida "
    "Gina Gloria Greta Heidi Helga Holly Ida Ines Iris Isabel Jasmine Jessica Joan Josephine Joyce "
    "Judith Kathy Katie Lena Leah Lola Louise Lydia Mabel Margaret Marie Matilda Melissa Mia Mona "
    "Monica Naomi Natalie Nicole Norma Pamela Patricia Penny Phoebe Polly Rebecca Rita Rosa Sandra "
    "Selma Sheila Silvia Stella Sylvia Teresa Thea Ursula Violet Yvonne".split()
)
TRAIN_BOYS: tuple[str, ...] = tuple(
    "John Tom James Peter Paul Mark David Daniel Jack Sam Ben Max Adam Alex Andrew Brian Carl "
    "Charles Chris Eric Frank Fred George Harry Henry Ian Jacob Joe Kevin Leo Luke Martin Michael "
    "Nick Oliver Oscar Patrick Robert Simon Steve "
    "Aaron Abel Alan Albert Alfred Anton Archie Arnold Arthur Axel Barry Bernard Billy Bruno Bruce "
    "Caleb Calvin Casper Cecil Clark Clive Colin Conrad Craig Curtis Dean Dennis Derek Donald Douglas "
    "Duncan Dylan Edgar Edwin Eli Elliot Emil Erik Ernest Ethan Evan Finn Floyd Francis Gary Gavin "
    "Gerald Gilbert Glen Gordon Graham Gregory Harold Hector Herbert Howard Igor Ivan Jason Jeff Jeremy "
    "Jerry Jim Jonas Jonathan Joseph Joshua Julian Karl Keith Kenneth Lars Lewis Lionel Louis Marcus "
    "Mario Marvin Matthew Maurice Miles Nathan Neil Nigel Noah Norman Otto Owen Percy Philip Ralph "
    "Raymond Roger Ronald Samuel Scott Sean Stanley Stuart Theo Toby Tony Warren".split()
)
HELD_OUT_GIRLS: tuple[str, ...] = tuple(
    "Lisa Eva Martha Nora Ivy Jenny Elena Sally Claire Megan Daisy Judy".split()
)
HELD_OUT_BOYS: tuple[str, ...] = tuple(
    "Bob Tim William Richard Thomas Victor Walter Ryan Edward Hugo Felix Dan".split()
)
TRAIN_NAMES = TRAIN_GIRLS + TRAIN_BOYS
HELD_OUT_NAMES = HELD_OUT_GIRLS + HELD_OUT_BOYS
GIRLS = TRAIN_GIRLS + HELD_OUT_GIRLS
BOYS = TRAIN_BOYS + HELD_OUT_BOYS

PLACES: tuple[str, ...] = tuple(
    "store park school garden beach library market station zoo museum farm kitchen office "
    "hospital restaurant cafe river lake forest church theater bakery house village shop".split()
)
OBJECTS: tuple[str, ...] = tuple(
    "drink book ball ring apple computer necklace bone cake letter flower key hat coat cup map box "
    "gift toy pencil camera kite sandwich cookie watch coin ticket basket lamp orange picture "
    "present umbrella basketball snack bag pen".split()
)
ANIMALS: tuple[str, ...] = tuple(
    "dog cat horse rabbit bird duck cow sheep goat mouse fox bear frog pig hen turtle".split()
)
COLORS: tuple[str, ...] = tuple("red blue green yellow white black brown gray orange pink".split())
FURS: tuple[str, ...] = ("black", "brown", "white", "gray", "yellow")
SIZES: tuple[str, ...] = ("small", "big", "little", "large", "tiny", "huge")
QUALITIES: tuple[str, ...] = tuple(
    "old new nice pretty shiny strange broken lovely beautiful simple heavy soft".split()
)
GOOD_MOODS: tuple[str, ...] = tuple("happy glad proud excited cheerful pleased".split())
BAD_MOODS: tuple[str, ...] = tuple("sad angry tired worried scared upset lonely".split())
TRAITS: tuple[str, ...] = tuple(
    "kind brave clever quiet funny friendly careful lazy shy curious gentle honest".split()
)
FOODS: tuple[str, ...] = tuple(
    "bread soup rice fish cheese salad pasta chicken fruit cake pizza potatoes eggs".split()
)
DRINKS: tuple[str, ...] = ("tea", "coffee", "milk", "water", "juice")
WEATHER: tuple[str, ...] = tuple("sunny rainy cold warm windy cloudy hot snowy".split())
TIMES: tuple[str, ...] = ("morning", "afternoon", "evening", "day")
DAYS: tuple[str, ...] = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
SEASONS: tuple[str, ...] = ("spring", "summer", "autumn", "winter")
JOBS: tuple[str, ...] = tuple(
    "teacher doctor farmer baker nurse driver painter singer writer cook pilot gardener".split()
)
NUMBERS: tuple[str, ...] = tuple("two three four five six seven eight nine ten".split())
GAMES: tuple[str, ...] = ("chess", "football", "cards", "tennis", "music", "a game")


def with_article(noun: str) -> str:
    """Put ``a`` or ``an`` before a noun phrase."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
