"""RCV1's topics, and the files of Mulan's subsets."""

from __future__ import annotations

# Topic and its name as words, in alphabetical order.
TOPICS = dict(
    line.split(" ", 1)
    for line in """\
C11 strategy plans
C12 legal judicial
C13 regulation policy
C14 share listings
C15 performance
C151 accounts earnings
C1511 annual results
C152 comment forecasts
C16 insolvency liquidity
C17 funding capital
C171 share capital
C172 bonds debt issues
C173 loans credits
C174 credit ratings
C18 ownership changes
C181 mergers acquisitions
C182 asset transfers
C183 privatisations
C21 production services
C22 new products services
C23 research development
C24 capacity facilities
C31 markets marketing
C311 domestic markets
C312 external markets
C313 market share
C32 advertising promotion
C33 contracts orders
C331 defence contracts
C34 monopolies competition
C41 management
C411 management moves
C42 labour
CCAT corporate industrial
E11 economic performance
E12 monetary economic
E121 money supply
E13 inflation prices
E131 consumer prices
E132 wholesale prices
E14 consumer finance
E141 personal income
E142 consumer credit
E143 retail sales
E21 government finance
E211 expenditure revenue
E212 government borrowing
E31 output capacity
E311 industrial production
E312 capacity utilization
E313 inventories
E41 employment labour
E411 unemployment
E51 trade reserves
E511 balance of payments
E512 merchandise trade
E513 reserves
E61 housing starts
E71 leading indicators
ECAT economics
G15 european community
G151 ec internal market
G152 ec corporate policy
G153 ec agriculture policy
G154 ec monetary economic
G155 ec institutions
G156 ec environment issues
G157 ec competition subsidy
G158 ec external relations
G159 ec general
GCAT government social
GCRIM crime law enforcement
GDEF defence
GDIP international relations
GDIS disasters and accidents
GENT arts culture entertainment
GENV environment and natural world
GFAS fashion
GHEA health
GJOB labour issues
GMIL millennium issues
GOBIT obituaries
GODD human interest
GPOL domestic politics
GPRO biographies personalities people
GREL religion
GSCI science and technology
GSPO sports
GTOUR travel and tourism
GVIO war civil war
GVOTE elections
GWEA weather
GWELF welfare social services
M11 equity markets
M12 bond markets
M13 money markets
M131 interbank markets
M132 forex markets
M14 commodity markets
M141 soft commodities
M142 metals trading
M143 energy markets
MCAT markets""".splitlines()
)
# The ten parts of `subsets` and their sha256.
SUBSETS = {
    "rcv1subset1_rows0000-2999.npz": (
        "fa80f23c053c2d183bd84c3312fd6ea30687374f6e4c6ff31986d795d3222e7e"
    ),
    "rcv1subset1_rows3000-5999.npz": (
        "5a3e16acf78d08bff6ffbc2467985cee2e07511efd20521f490fb29c7abab02c"
    ),
    "rcv1subset2_rows0000-2999.npz": (
        "267fcef1b6b2d552b36d8b8069af3b325021a7ce25ccb9e5123977021066dca9"
    ),
    "rcv1subset2_rows3000-5999.npz": (
        "422b1cb4674047b77dec38e73d1e839864397f6bc58be52141c5594556d3fd3a"
    ),
    "rcv1subset3_rows0000-2999.npz": (
        "954fa0133be95669fcfa8120cc5f063301104152bf459667230090793e793ef5"
    ),
    "rcv1subset3_rows3000-5999.npz": (
        "2f0d03713c45a8fc010900c8cf573f0f62582ead2e28247e06967a505a948bbb"
    ),
    "rcv1subset4_rows0000-2999.npz": (
        "ecfe9eda03662790778ebf755724be10adeb33dc062bb191d47ef6f650df6d4e"
    ),
    "rcv1subset4_rows3000-5999.npz": (
        "353e5d7af429ec87984431a291ed81e7ae409a5939eee67dc2daddae0c46509f"
    ),
    "rcv1subset5_rows0000-2999.npz": (
        "d9318bc1a77701db1e34abcc32892c0b6e2f9761bb0ba88ed685800a99fd724d"
    ),
    "rcv1subset5_rows3000-5999.npz": (
        "3568c53d7c18d278588ac97160b64a9757ccdbaba3a87139f5977e54be98964b"
    ),
}
